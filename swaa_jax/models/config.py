"""What all decoder families' configs share, read from an HF `config.json`."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.checkpoint.hf import TOKEN_IDS
from swaa_jax.fields import check_keys, show
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import FULL, WINDOWED, attention_fields
from swaa_jax.models.rope import SCALINGS, RopeConfig, YarnScaling, parse_rope
from swaa_jax.models.unread import warn_of_unread
from swaa_jax.policy import AttentionPolicy

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

COMMON_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""What most families take where their `config.json` has no such field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes and constants of a pre-norm, gated, rotary decoder.

    Frozen and hashable, so that it can be part of a jitted function's static arguments. A family
    is a subclass that says how its `config.json` is read; `hf_json` keeps that file whole, so a
    saved model has every field that the loaded one had.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    activation_field: ClassVar[str] = "hidden_act"
    defaults: ClassVar[Mapping[str, Any]] = COMMON_DEFAULTS
    """The fields that a file may leave out, with what Transformers takes then. A field that is
    absent is not off: its default may be a window or a soft cap. Null is off, where it may be."""
    also_required: ClassVar[tuple[str, ...]] = ()
    default_theta: ClassVar[float] = 10_000.0
    rope_types: ClassVar[tuple[str, ...]] = tuple(SCALINGS)

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    hidden_act: str
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    one_centred_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor on the attention scores; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    local_layers: tuple[int, ...] = ()
    """The layers that the checkpoint calls local, whether they have a window or not."""
    local_rope: RopeConfig | None = None
    """The rope of the local layers, where it is not the others'."""
    own: AttentionPolicy = AttentionPolicy()
    """The policy that the checkpoint itself asks for: full attention unless it has a window."""
    hf_json: str = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.num_attention_heads: expected a multiple of num_key_value_heads="
                f"{self.num_kv_heads}, got {self.num_heads}; correct config.json or the override"
            )
        if self.head_dim % 2:
            raise ValueError(
                "config.head_dim: expected an even number, for rotary pairs, got "
                f"{self.head_dim}; correct config.json or the override"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise NotImplementedError(
                f"config.{self.activation_field}: expected one of {', '.join(ACTIVATIONS)}, got "
                f"{show(self.hidden_act)}; correct config.json or the override"
            )

    @property
    def expert_share(self) -> float:
        """The part of a layer's experts that a token goes to; 1 without experts."""
        return 1.0

    @property
    def num_stored_experts(self) -> int:
        """The experts of a layer that has some; 0 where none has."""
        return 0

    @property
    def active_ffw_size(self) -> int:
        """Width of what a token's feed-forward passes, at most: of experts, its own together."""
        return self.intermediate_size

    @property
    def sizes(self) -> dict[str, Any]:
        """What the shapes of the weights follow from, under HF's names."""
        return {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    def layer_rope(self, index: int) -> RopeConfig:
        """The rope of a layer: a matter of how it was trained, whatever policy it runs under."""
        return self.rope if self.local_rope is None or index not in self._local else self.local_rope

    @functools.cached_property
    def _local(self) -> frozenset[int]:
        return frozenset(self.local_layers)

    @classmethod
    def from_hf(
        cls, hf: HfConfig, overrides: Mapping[str, object] | None = None
    ) -> "DecoderConfig":
        """Read a `config.json`, old form or new.

        Args:
            hf: the file's content.
            overrides: fields, under their HF names, that replace the file's. A `rope_theta` or
                `rope_scaling` given here replaces what either form of the file says.

        Raises:
            ValueError: a field that has no default is missing, or an override that the family
                does not read, by name.
            NotImplementedError: a value that this library does not support.
        """
        stated = _overridden(hf, overrides or {}, known=cls.hf_fields())
        read = {**cls.defaults, **stated}
        cls.require(read, (*_REQUIRED, cls.activation_field, *cls.also_required))
        _refuse_nulls(read, cls.defaults)
        if not read.get("is_causal", True):
            raise NotImplementedError(
                "config.is_causal: expected true, since an attention policy is causal, got "
                f"{show(read['is_causal'])}; set it to true if the model generates text"
            )
        warn_of_unread(stated, known=cls.hf_fields(), model_type=cls.model_type)
        rope = parse_rope(
            cls.rope_settings(read), supported=cls.rope_types, default_theta=cls.default_theta
        )
        context = _context(read, rope, overrides or {})
        num_heads = read["num_attention_heads"]
        eos = read["eos_token_id"]
        has_bias = "attention_bias" in cls.defaults and read["attention_bias"]
        return cls(
            vocab_size=read["vocab_size"],
            num_layers=read["num_hidden_layers"],
            hidden_size=read["hidden_size"],
            intermediate_size=read["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=read["num_key_value_heads"] or num_heads,
            max_position_embeddings=context,
            rms_norm_eps=read["rms_norm_eps"],
            rope=rope,
            hidden_act=read[cls.activation_field],
            tie_word_embeddings=read["tie_word_embeddings"],
            bos_token_id=read["bos_token_id"],
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=read["pad_token_id"],
            hf_json=json.dumps(
                {**_with_context(stated, rope, context), "model_type": cls.model_type},
                sort_keys=True,
            ),
            **{
                "head_dim": read["head_dim"] or read["hidden_size"] // num_heads,
                "attention_bias": has_bias,
                "output_bias": has_bias,
                **cls.family_fields(read),
            },
        )

    @classmethod
    def require(cls, hf: HfConfig, names: Sequence[str]) -> None:
        """Raises ValueError unless the file has all of these fields."""
        missing = [name for name in names if hf.get(name) is None]
        if missing:
            raise ValueError(
                f"config: expected {missing} for model_type {cls.model_type!r}, got none; "
                "complete config.json or pass them in config_overrides"
            )

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Fields whose value is not what the common decoder reads or has by default."""
        del hf
        return {}

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """HF names of the fields that this family reads, hence those that can be overridden."""
        required = (*_REQUIRED, cls.activation_field, *cls.also_required)
        return _ROPE_FIELDS.union(required, cls.defaults, ("is_causal",))

    @classmethod
    def rope_settings(cls, hf: HfConfig) -> HfConfig:
        """Where `parse_rope` finds the settings of the (full-attention) layers' rope."""
        return hf

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """The fields that give layers these kinds, and the windowed ones this window.

        Args:
            kinds: `FULL` or `WINDOWED` for each layer.
            window: keys a query sees, itself included; None: all layers are full.

        Raises:
            NotImplementedError: the part of the policy that Transformers has no field for.
        """
        del kinds
        if window is not None:
            raise NotImplementedError(f"window={window}: it has no window")
        return {}

    def to_hf(self, policy: AttentionPolicy | None = None) -> dict[str, object]:
        """The HF `config.json` of this model, every unread field included.

        Args:
            policy: to be expressed in it, so that stock Transformers runs it. None: the policy
                that the file asks for already.

        Raises:
            NotImplementedError: Transformers cannot express the policy; every part is named.
        """
        policy = self.own if policy is None else policy
        # Transformers wants a window where there are local layers, one that none reaches as well.
        is_said = policy == self.own and not (self.own.is_full and self.local_layers)
        fields = {} if is_said else attention_fields(self, policy)
        return {**json.loads(self.hf_json), "architectures": [self.architecture], **fields}


WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""Fields of a config that make its own policy, of families that have them."""


def refuse_idle_overrides(
    kind: type[DecoderConfig], hf: HfConfig, overrides: Mapping[str, object], config: DecoderConfig
) -> None:
    """Raises ValueError for an override that another field of the config makes idle, such as a
    `sliding_window` where `use_sliding_window` is false, and for a token that the model lacks.

    Args:
        kind: of the config.
        hf: the file's content.
        overrides: as `DecoderConfig.from_hf` took them.
        config: what it made of them.
    """
    stated = {**kind.defaults, **hf}
    for name in sorted(set(overrides) - _ROPE_FIELDS):
        value = overrides[name]
        if value == stated.get(name, value):
            continue  # the file says so already
        ids = value if isinstance(value, list) else [value]
        if name in TOKEN_IDS and any(
            isinstance(one, int) and one >= config.vocab_size for one in ids
        ):
            raise ValueError(
                f"config_overrides.{name}: expected ids below vocab_size={config.vocab_size}, got "
                f"{show(value)}; look them up in the tokenizer's vocabulary"
            )
        rest = {other: given for other, given in overrides.items() if other != name}
        try:
            same = dataclasses.replace(kind.from_hf(hf, rest), hf_json=config.hf_json) == config
        except (ValueError, NotImplementedError):
            continue  # the file needs it
        if same:
            advice = (
                "override use_sliding_window, and max_window_layers or layer_types, with it, or "
                "give a policy (--window)"
                if name in WINDOW_FIELDS
                else "leave it out, or override with it the field that it depends on"
            )
            raise ValueError(
                f"config_overrides.{name}: expected a value that changes the model, got "
                f"{show(value)}, which the other fields of its config make idle; {advice}"
            )


def local_fields(hf: HfConfig, kinds: Sequence[str] | None, window: int | None) -> dict[str, Any]:
    """The fields of a config that names each layer's kind: its local layers and its policy.

    HF's window counts the query itself, as ours does.

    Args:
        hf: the config.
        kinds: of each layer; None: all are windowed.
        window: of the windowed ones; None: they see everything, and are local all the same.
    """
    num_layers = hf["num_hidden_layers"]
    named = [WINDOWED] * num_layers if kinds is None else list(kinds)
    unknown = sorted(set(named) - {FULL, WINDOWED})
    if len(named) != num_layers or unknown:
        raise ValueError(
            f"config.layer_types: expected {num_layers} entries of {FULL!r} or {WINDOWED!r}, got "
            f"{len(named)}{f' with {show(unknown)}' if unknown else ''}; correct config.json"
        )
    local = tuple(index for index, kind in enumerate(named) if kind == WINDOWED)
    full = tuple(index for index, kind in enumerate(named) if kind == FULL)
    own = AttentionPolicy()
    if window is not None and local:
        own = AttentionPolicy(window=window, full_attention_layers=full)
    return {"own": own, "local_layers": local}


def switched_local_fields(hf: HfConfig) -> dict[str, Any]:
    """The same of a config with `use_sliding_window`, `sliding_window` and, per layer,
    `layer_types` or the older `max_window_layers` (layers from that index on are windowed).
    """
    kinds = hf["layer_types"]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    if window is None:
        if kinds is not None and set(kinds) != {FULL}:
            raise ValueError(
                f"config.layer_types: expected {FULL!r} alone where use_sliding_window is false or "
                f"sliding_window null, got {show(sorted(set(kinds)))}; correct one of the three"
            )
        return local_fields(hf, [FULL] * hf["num_hidden_layers"] if kinds is None else kinds, None)
    if kinds is None:
        num_full = min(hf["max_window_layers"], hf["num_hidden_layers"])
        kinds = [FULL] * num_full + [WINDOWED] * (hf["num_hidden_layers"] - num_full)
    return local_fields(hf, kinds, window)


_REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_NULL_IS_OFF = (
    "attn_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "final_logit_softcapping",
    "num_key_value_heads",
    "pad_token_id",
    "sliding_window",
    "use_bidirectional_attention",
)


def _refuse_nulls(read: HfConfig, defaults: Mapping[str, Any]) -> None:
    """Null says nothing where a field has a value in every model, and Transformers refuses it."""
    nulls = [
        name
        for name, default in defaults.items()
        if read[name] is None and default is not None and name not in _NULL_IS_OFF
    ]
    if nulls:
        shown = " and ".join(f"{name} ({show(defaults[name])} if left out)" for name in nulls)
        raise ValueError(
            f"config: expected a value for {shown}, got null; correct config.json or the override"
        )


def _overridden(
    hf: HfConfig, overrides: Mapping[str, Any], *, known: frozenset[str]
) -> dict[str, Any]:
    """The file with the overrides and their consequences: of the rope settings one form stays, so
    that no stale field contradicts it.
    """
    check_keys("config_overrides", overrides, sorted(known))
    changed = {**hf, **overrides}
    given = _ROPE_FIELDS.intersection(overrides)
    if not given:
        return changed
    stored = hf.get("rope_parameters") or {}
    by_kind = FULL in stored  # one dict for each kind of layer
    current = dict(stored[FULL] if by_kind else stored)
    if "rope_theta" in hf:
        current.setdefault("rope_theta", hf["rope_theta"])
    if "rope_parameters" in given:
        rope = dict(overrides["rope_parameters"] or {})
    else:
        scaling = overrides.get("rope_scaling", hf.get("rope_scaling") or current)
        theta = {"rope_theta": current["rope_theta"]} if "rope_theta" in current else {}
        rope = {**theta, **(scaling or {})}
    if "rope_theta" in given:
        rope["rope_theta"] = overrides["rope_theta"]
    if by_kind and FULL not in rope:
        rope = {**stored, FULL: rope}
    rest = {name: value for name, value in changed.items() if name not in _ROPE_FIELDS}
    return {**rest, "rope_parameters": rope}


def _context(hf: HfConfig, rope: RopeConfig, overrides: Mapping[str, object]) -> int:
    """The longest context: longer than the file says if YaRN was asked for in an override."""
    stated = hf["max_position_embeddings"]
    asked = _ROPE_FIELDS.intersection(overrides) and "max_position_embeddings" not in overrides
    if asked and isinstance(rope.scaling, YarnScaling):
        return max(stated, int(rope.scaling.factor * rope.scaling.original_max_position_embeddings))
    return stated


def _with_context(stated: Mapping[str, Any], rope: RopeConfig, context: int) -> dict[str, Any]:
    """The file's content with a context that was derived. YaRN's original context, which follows
    from the context where it is not stated, is stated then.
    """
    if context == stated["max_position_embeddings"]:
        return dict(stated)
    assert isinstance(rope.scaling, YarnScaling), "nothing else lengthens a context"
    original = {"original_max_position_embeddings": rope.scaling.original_max_position_embeddings}
    ropes = stated["rope_parameters"]
    ropes = {**ropes, FULL: ropes[FULL] | original} if FULL in ropes else {**ropes, **original}
    return {**stated, "max_position_embeddings": context, "rope_parameters": ropes}
