"""What all decoder families' configs share, read from an HF `config.json`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.fields import check_keys, show
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import FULL, WINDOWED, attention_fields
from swaa_jax.models.rope import SCALINGS, RopeConfig, YarnScaling, parse_rope
from swaa_jax.policy import AttentionPolicy

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


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
    tied_by_default: ClassVar[bool] = False
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
    local_rope: RopeConfig | None = None
    """The rope of the layers that `own` windows, where it is not the others'."""
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

    def layer_rope(self, index: int) -> RopeConfig:
        """The rope of a layer: a matter of how it was trained, whatever policy it runs under."""
        if self.local_rope is None or self.own.resolve(self.num_layers)[index].is_full:
            return self.rope
        return self.local_rope

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
        hf = {**hf, **_override(hf, overrides or {}, known=cls.hf_fields())}
        cls.require(hf, (*_REQUIRED, cls.activation_field))
        num_heads = hf["num_attention_heads"]
        has_bias = "attention_bias" in cls.hf_fields() and bool(hf.get("attention_bias"))
        eos = hf.get("eos_token_id")
        rope = parse_rope(cls.rope_settings(hf), cls.rope_types)
        return cls(
            vocab_size=hf["vocab_size"],
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            max_position_embeddings=_context(hf, rope, overrides or {}),
            rms_norm_eps=hf["rms_norm_eps"],
            rope=rope,
            hidden_act=hf[cls.activation_field],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", cls.tied_by_default)),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=hf.get("pad_token_id"),
            hf_json=json.dumps({**hf, "model_type": cls.model_type}, sort_keys=True),
            **{
                "head_dim": hf.get("head_dim") or hf["hidden_size"] // num_heads,
                "attention_bias": has_bias,
                "output_bias": has_bias,
                **cls.family_fields(hf),
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
        return _COMMON_FIELDS | {cls.activation_field}

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
        fields = {} if policy in (None, self.own) else attention_fields(self, policy)
        return {**json.loads(self.hf_json), "architectures": [self.architecture], **fields}


def layer_kinds_policy(
    hf: HfConfig, kinds: Sequence[str] | None, window: int | None
) -> AttentionPolicy:
    """The policy of a config that names each layer's kind; None: all layers are windowed.

    HF's window counts the query itself, as ours does.
    """
    num_layers = hf["num_hidden_layers"]
    named = [WINDOWED] * num_layers if kinds is None else list(kinds)
    unknown = sorted(set(named) - {FULL, WINDOWED})
    if len(named) != num_layers or unknown:
        raise ValueError(
            f"config.layer_types: expected {num_layers} entries of {FULL!r} or {WINDOWED!r}, got "
            f"{len(named)}{f' with {show(unknown)}' if unknown else ''}; correct config.json"
        )
    full = tuple(index for index, kind in enumerate(named) if kind == FULL)
    if window is None or len(full) == num_layers:
        return AttentionPolicy()
    return AttentionPolicy(window=window, full_attention_layers=full)


def windowed_layers_policy(hf: HfConfig) -> AttentionPolicy:
    """The policy of a config with `use_sliding_window`, `sliding_window` and, per layer,
    `layer_types` or the older `max_window_layers` (layers from that index on are windowed).
    """
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return AttentionPolicy()
    kinds = hf.get("layer_types")
    if kinds is None:
        if hf.get("max_window_layers") is None:
            raise ValueError(
                "config: expected layer_types or max_window_layers with use_sliding_window, got "
                "neither; complete config.json, or pass one in config_overrides"
            )
        num_full = min(hf["max_window_layers"], hf["num_hidden_layers"])
        kinds = [FULL] * num_full + [WINDOWED] * (hf["num_hidden_layers"] - num_full)
    return layer_kinds_policy(hf, kinds, hf["sliding_window"])


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
_COMMON_FIELDS = (
    frozenset(_REQUIRED)
    | _ROPE_FIELDS
    | {
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)


def _override(
    hf: HfConfig, overrides: Mapping[str, Any], *, known: frozenset[str]
) -> dict[str, Any]:
    """The overrides with their consequences: both forms of the rope settings stay in step."""
    check_keys("config_overrides", overrides, sorted(known))
    changed = dict(overrides)
    if not _ROPE_FIELDS.intersection(overrides):
        return changed
    stored = hf.get("rope_parameters") or {}
    by_kind = FULL in stored  # one dict for each kind of layer
    if "rope_parameters" in overrides:
        rope = dict(overrides["rope_parameters"] or {})
    else:
        current = stored[FULL] if by_kind else stored
        theta = current.get("rope_theta", hf.get("rope_theta"))
        scaling = overrides.get("rope_scaling", hf.get("rope_scaling") or current)
        rope = {**(scaling or {}), "rope_theta": overrides.get("rope_theta", theta)}
    if by_kind and FULL not in rope:
        rope = {**stored, FULL: rope}
    # One form only in the result, so that no stale field contradicts it.
    return {**changed, "rope_parameters": rope, "rope_scaling": None, "rope_theta": None}


def _context(hf: HfConfig, rope: RopeConfig, overrides: Mapping[str, object]) -> int:
    """The longest context: longer than the file says if YaRN was asked for in an override."""
    stated = hf["max_position_embeddings"]
    asked = _ROPE_FIELDS.intersection(overrides) and "max_position_embeddings" not in overrides
    if asked and isinstance(rope.scaling, YarnScaling):
        return max(stated, int(rope.scaling.factor * rope.scaling.original_max_position_embeddings))
    return stated
