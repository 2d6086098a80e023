"""The attention policy: which keys each layer sees for prompt tokens and for answer tokens.

A policy combines the first three methods of the paper (arXiv 2512.10411, section 3): FA decode,
keeping the first k tokens, and interleaving full-attention (FA) layers with sliding-window (SWA)
layers. Query i sees key j exactly when

    j <= i  and  same segment  and
    ( the layer or its KV head is full  or  (i is an answer token and the layer decodes in full)
      or  i - j < window  or  j - segment_start < num_sink_tokens )

`AttentionPolicy` is the symbolic object that people write, save and compare. Its
`resolve(num_layers)` gives one `LayerAttention` a layer, which is what kernels, masks, caches, the
trainer and the exporters take.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from etils import epath

from swaa_jax.arguments import told_keywords
from swaa_jax.documents import parse_json, parse_yaml
from swaa_jax.fields import (
    Check,
    check_fields,
    check_keys,
    flag,
    integer,
    mapping,
    or_none,
    plain,
    set_field,
    show,
)
from swaa_jax.limits import MAX_KEYS
from swaa_jax.policy.layers import (
    HeadPairs,
    HeadSelection,
    LayerSelection,
    check_idle_heads,
    decode_layers,
    distinct_heads,
    head_selection,
    layer_selection,
    resolve_decode,
    resolve_heads,
    resolve_layers,
)
from swaa_jax.policy.swaa_config import SWAA_CONFIG_KEYS, from_swaa_config, to_swaa_config
from swaa_jax.policy.text import policy_fields, policy_text
from swaa_jax.storage import read_text, write_text_atomic
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AttentionPolicy", "HfExpressible", "LayerAttention"]

_ELSEWHERE = {
    "window_size": "window",
    "sliding_window": "window",
    "sliding_window_size": "window",
    "sinks": "num_sink_tokens",
    "keep_first": "num_sink_tokens",
    "full_layers": "full_attention_layers",
    "non_sliding_layers": "full_attention_layers",
    "full_heads": "full_attention_heads",
    "force_fa_decode": "decode",
    "tail": "full_attention_tail",
}
"""Names of the fields on the command line, in the reference and in Transformers."""

# Keys of a policy file besides the policy's own fields; see `swaa_jax.policy.files`.
_FILE_NOTES = ("description", "source", "needs", "evidence")


def _keys(*, least: int) -> Check[int]:
    return lambda name, value: integer(most=MAX_KEYS)(name, integer(least=least)(name, value))


def _window(name: str, value: object) -> int | None:
    try:
        return or_none(_keys(least=1))(name, value)
    except ValueError as error:
        is_number = isinstance(value, str | float) and str(value)[:1].isdigit()
        advice = "" if is_number else "; None, or null, means full attention"
        raise ValueError(f"{error}{advice}") from None


@told_keywords(_ELSEWHERE | {"decode": "full_decode"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """The attention of one layer, after `AttentionPolicy.resolve` (arXiv 2512.10411, section 3).

    A full layer is ``window=None``. Nothing else can change what it sees, so the other fields of a
    full layer are always their defaults, whatever was passed: equal behaviour compares equal.

    Attributes:
        window: keys that a query sees back from itself, itself included; None: all of them.
        num_sink_tokens: first tokens of each segment that stay visible outside the window.
        full_decode: answer tokens see all keys.
        full_attention_tail: last prompt tokens that see all keys.
        full_heads: KV heads that see all keys, with the query heads of their groups. The other
            fields are those of the other heads; `swaa_jax.attention.split_heads` tells them apart.

    Examples:
        >>> LayerAttention(window=2048, num_sink_tokens=10, full_decode=True).needs_full_cache
        True
        >>> LayerAttention(num_sink_tokens=10) == LayerAttention()
        True
    """

    window: int | None = None
    num_sink_tokens: int = 0
    full_decode: bool = False
    full_attention_tail: int = 0
    full_heads: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self, window=_window)
        if self.window is None:
            for field in dataclasses.fields(self):
                set_field(self, field.name, field.default)
            return
        check_fields(
            self,
            num_sink_tokens=_keys(least=0),
            full_decode=flag,
            full_attention_tail=_keys(least=0),
            full_heads=distinct_heads,
        )

    @property
    def is_full(self) -> bool:
        """Every query of the layer sees all keys before it."""
        return self.window is None

    @property
    def needs_full_cache(self) -> bool:
        """Decoding may read any key, so none can be dropped: a full layer, or FA decode.

        This says nothing about `full_heads`, whose keys are always kept.
        """
        return self.is_full or self.full_decode


@runtime_checkable
class HfExpressible(Protocol):
    """A model's config: it knows how its family's `config.json` says an attention policy.

    >>> import swaa_jax as swaa
    >>> isinstance(swaa.load_model("tiny-retriever").config, HfExpressible)
    True
    """

    def to_hf(self, policy: "AttentionPolicy | None" = None) -> dict[str, object]:
        """The `config.json` that says the policy."""
        ...


@told_keywords(_ELSEWHERE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPolicy:
    """Window, sink tokens, full layers and FA decode of a model (arXiv 2512.10411, section 3).

    Frozen and hashable, so that it may be part of a static jit argument. Lists become tuples and
    slices stay symbolic: a policy is written without knowing the model's depth.

    Layer selections (`full_attention_layers`, and `decode` for some layers only) are either

    * ints: distinct, from 0; negative ones count from the last layer, as in Python. They are kept
      sorted, since their order says nothing. ``range(1, 36, 2)`` is good too;
    * or a slice of the layers in a string, ``"1::2"``, with a positive step. Quote it in YAML,
      where a bare ``1:36`` is the number 96 (YAML 1.1 reads it in base sixty).

    Attributes:
        window: keys that a query sees back from itself, itself included (the reference's
            Transformers path counts alike; its vLLM path sees one more). None: full attention in
            all layers, and then every other field must keep its default.
        num_sink_tokens: first tokens of each segment that stay visible outside the window, at their
            own positions. The paper's "keep first k", section 3.2; the reference's `keep_first`.
        full_attention_layers: layers that keep full attention. Section 3.3; the reference's
            `non_sliding_layers`.
        full_attention_heads: KV heads that keep full attention in layers that are windowed
            otherwise, with every query head of their groups: ``{3: [0, 2], 5: [1]}``. Layers count
            as above; kept as sorted pairs of a layer and its heads. Their caches keep all keys,
            the other heads' only the window. On a mesh whose `tensor` axis does not divide the
            full heads of a layer, or its others, each device computes all of those.
        decode: ``"window"``: answer tokens see the window too; ``"full"``: they see everything, in
            all layers (FA decode, section 3.1; the reference's `force_fa_decode`); or the layers in
            which they see everything. FA decode saves prefill time, not memory: its layers keep all
            keys and values.
        full_attention_tail: this many last prompt tokens see everything, in all layers. 0 in the
            paper, where the first answer token is predicted from a windowed row.

    Raises:
        ValueError: a field is malformed, or has no effect because `window` is None.

    Examples:
        >>> policy = AttentionPolicy(window=2048, num_sink_tokens=10, full_attention_layers="1::2")
        >>> print(policy)
        window=2048,sinks=10,full_layers=1::2
        >>> [layer.window for layer in policy.resolve(4)]
        [2048, None, 2048, None]
        >>> AttentionPolicy().is_full
        True
        >>> AttentionPolicy(window=64, full_attention_layers=[5, -1, 1]).full_attention_layers
        (1, 5, -1)
    """

    window: int | None = None
    num_sink_tokens: int = 0
    full_attention_layers: LayerSelection = ()
    full_attention_heads: HeadSelection = ()
    decode: LayerSelection = "window"
    full_attention_tail: int = 0

    def __post_init__(self):
        check_fields(
            self,
            window=_window,
            num_sink_tokens=_keys(least=0),
            full_attention_layers=layer_selection,
            full_attention_heads=head_selection,
            decode=decode_layers,
            full_attention_tail=_keys(least=0),
        )
        check_idle_heads("full_attention_heads", dict(self._heads), self.full_attention_layers)
        if self.window is None:
            idle = [
                f"{field.name}={show(getattr(self, field.name))}"
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default
            ]
            if idle:
                raise ValueError(
                    f"window: expected a window beside {', '.join(idle)}, which would have no "
                    "effect under full attention, got None; give one, or leave the rest out"
                )

    def __str__(self) -> str:
        """The policy in one line, which `parse` reads."""
        return policy_text(self)

    def _repr_html_(self) -> str:
        """The policy drawn, for notebooks: its mask and its layers."""
        from swaa_jax.policy.drawing import policy_html  # which needs JAX

        return policy_html(self)

    def plot(self, path: PathLike | None = None, *, num_layers: int | None = None) -> "Figure":
        """The policy's mask and layers as a figure of matplotlib.

        Args:
            path: where to save it, such as ``policy.png``.
            num_layers: the model's depth; None: one that the policy fits.

        Examples:
            >>> figure = AttentionPolicy(window=64, decode="full").plot()
        """
        from swaa_jax.policy.drawing import policy_figure

        return policy_figure(self, path, num_layers)

    @classmethod
    def parse(cls, policy: str) -> "AttentionPolicy":
        """Reads a policy from one line of text, the inverse of `str`.

        Args:
            policy: ``full``, or fields as in ``window=2048,sinks=10,full_layers=1::2,decode=full``.
                The keys are window, sinks, full_layers, full_heads, decode and tail, or the fields'
                own names. Layers are a slice or ``0+3+-1``, heads ``3:0+2/5:1``.

        Raises:
            ValueError: no such text, an unknown key or a malformed value.

        Examples:
            >>> policy = AttentionPolicy.parse("window=64,sinks=4,full_heads=3:0+2/-1:1,decode=0+3")
            >>> policy.full_attention_heads, policy.decode
            (((3, (0, 2)), (-1, (1,))), (0, 3))
            >>> str(policy)
            'window=64,sinks=4,full_heads=3:0+2/-1:1,decode=0+3'
        """
        return cls(**policy_fields(policy))

    @property
    def _heads(self) -> HeadPairs:
        return self.full_attention_heads  # pyright: ignore[reportReturnType]  (since construction)

    @property
    def is_full(self) -> bool:
        """Full attention in every layer, whatever the model's depth."""
        return self.window is None

    def resolve(
        self, num_layers: int, *, num_kv_heads: int | None = None
    ) -> tuple[LayerAttention, ...]:
        """The attention of each layer of a model with `num_layers` layers.

        Args:
            num_layers: the model's depth.
            num_kv_heads: KV heads of each layer; a layer whose heads are all full is a full layer
                then. None: not known, and heads are not checked.

        Raises:
            ValueError: a layer or head is out of range, two ints name one layer (-1 and 35 of 36),
                a slice selects nothing or ends beyond the last layer, or a layer with full heads is
                among the full layers.

        Examples:
            >>> policy = AttentionPolicy(window=64, full_attention_layers=[-1], decode="0:2")
            >>> [(layer.window, layer.full_decode) for layer in policy.resolve(3)]
            [(64, True), (64, True), (None, False)]
        """
        num_layers = integer(least=1)("num_layers", num_layers)
        full = resolve_layers("full_attention_layers", self.full_attention_layers, num_layers)
        full_decode = resolve_decode(self.decode, num_layers)
        heads = resolve_heads(
            "full_attention_heads",
            self._heads,
            num_layers,
            num_kv_heads=num_kv_heads,
            full_layers=full,
        )
        windowed = {
            "window": self.window,
            "num_sink_tokens": self.num_sink_tokens,
            "full_attention_tail": self.full_attention_tail,
        }
        return tuple(
            LayerAttention()
            if self.is_full or layer in full or len(heads[layer]) == num_kv_heads
            else LayerAttention(
                **windowed, full_decode=layer in full_decode, full_heads=heads[layer]
            )
            for layer in range(num_layers)
        )

    def to_dict(self) -> dict[str, object]:
        """All fields, as JSON's types: tuples become lists, and full heads a mapping.

        Without full heads their field is left out, so that versions that do not know it can read
        the policy.

        >>> AttentionPolicy(window=64, full_attention_heads={3: [0]}).to_dict()
        {'window': 64, 'num_sink_tokens': 0, 'full_attention_layers': [],
         'full_attention_heads': {'3': [0]}, 'decode': 'window', 'full_attention_tail': 0}
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        heads = {str(layer): list(of_layer) for layer, of_layer in self._heads}
        if heads:
            fields["full_attention_heads"] = heads
        else:
            del fields["full_attention_heads"]
        return plain(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "AttentionPolicy":
        """The inverse of `to_dict`; fields that are left out keep their defaults.

        Raises:
            ValueError: a key is not a field of a policy (the nearest one is suggested), or a value
                is malformed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        advice = ""
        if {"swaa_config", *SWAA_CONFIG_KEYS} & set(fields):
            advice = "this is the reference's format: read it with from_swaa_config"
        elif "policy" in fields:
            advice = "pass only what is under 'policy'"
        check_keys("attention policy", fields, known, advice)
        return cls(**fields)

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, document: str) -> "AttentionPolicy":
        """Parses a policy in JSON; see `from_yaml` for the keys."""
        return cls._from_document(parse_json(document))

    def to_yaml(self) -> str:
        """The fields as a YAML mapping, slices quoted.

        Examples:
            >>> print(AttentionPolicy(window=64, full_attention_layers="1::2").to_yaml())
            window: 64
            num_sink_tokens: 0
            full_attention_layers: "1::2"
            decode: window
            full_attention_tail: 0
        """
        # A JSON value is a YAML value, so the scalars need no YAML writer, and slices come quoted.
        lines = [
            f"{name}: {value if value in ('window', 'full') else json.dumps(value)}"
            for name, value in self.to_dict().items()
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, document: str) -> "AttentionPolicy":
        """Parses a policy in YAML: a mapping of the policy's fields.

        The notes of a policy file (`description`, `needs` and others; see `swaa_jax.configs`) are
        accepted and left out. Numbers in base sixty, as YAML 1.1 reads a bare ``1:36``, and
        repeated keys are errors.

        Examples:
            >>> AttentionPolicy.from_yaml("{window: 64, decode: full}")
            AttentionPolicy(window=64, num_sink_tokens=0, full_attention_layers=(),
                            full_attention_heads=(), decode='full', full_attention_tail=0)

        Raises:
            ValueError: not YAML, not a mapping, an unknown key, or a malformed value.
        """
        return cls._from_document(parse_yaml(document))

    @classmethod
    def load(cls, path: PathLike) -> "AttentionPolicy":
        """Reads a policy from a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ValueError: the file is malformed; the message names it.
            FileNotFoundError: there is no such file.
        """
        path = epath.Path(path)
        try:
            read = cls.from_json if path.suffix == ".json" else cls.from_yaml
            return read(read_text(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: PathLike) -> None:
        """Writes the policy to a ``.json`` file, or to YAML under any other name."""
        path = epath.Path(path)
        is_json = path.suffix == ".json"
        write_text_atomic(path, f"{self.to_json()}\n" if is_json else self.to_yaml())

    @classmethod
    def _from_document(cls, document: object) -> "AttentionPolicy":
        """A policy from a parsed file, without the file's notes."""
        fields = mapping("attention policy", document)
        return cls.from_dict({k: v for k, v in fields.items() if k not in _FILE_NOTES})

    @classmethod
    def from_swaa_config(
        cls, config: Mapping[str, object] | PathLike, *, num_layers: int | None = None
    ) -> "AttentionPolicy":
        """Reads the configuration of the paper's reference code.

        Args:
            config: a mapping, or the path of a JSON file: either the four settings
                (`sliding_window_size`, `keep_first`, `force_fa_decode`, `non_sliding_layers`), or
                an entry of its settings lists, ``{"swaa_config": {...}, "model_list": [...]}``.
                Settings left out are the reference's defaults. `model_list` is not used.
            num_layers: the model's depth. The reference's own files name layers up to 47 for a
                36-layer model, and it ignores them. With `num_layers`, layers out of range are
                dropped with one warning; without it they stay, and `resolve` raises.

        Raises:
            ValueError: an unknown key or a malformed value.

        Examples:
            >>> print(AttentionPolicy.from_swaa_config(
            ...     {"swaa_config": {"sliding_window_size": 2000, "keep_first": 10,
            ...                      "force_fa_decode": True, "non_sliding_layers": [1, 3]}}))
            window=2000,sinks=10,full_layers=1+3,decode=full
        """
        return cls(**from_swaa_config(config, num_layers=num_layers))

    def to_hf_config(self, config: HfExpressible) -> dict[str, object]:
        """The HF `config.json` under which stock Transformers runs this policy.

        Args:
            config: a model's (`model.config`).

        Raises:
            NotImplementedError: the family cannot express the policy; every part is named.
        """
        return config.to_hf(self)

    def to_swaa_config(self, *, num_layers: int | None = None) -> dict[str, object]:
        """The configuration of the paper's reference code, ``{"swaa_config": {...}}``.

        Args:
            num_layers: the model's depth, needed where layers are given by a slice or from the end,
                because the reference knows only explicit lists.

        Raises:
            ValueError: the reference cannot express the policy (`full_attention_heads`,
                `full_attention_tail`), or `num_layers` is needed.

        Examples:
            >>> policy = AttentionPolicy(window=64, full_attention_layers="1::2")
            >>> policy.to_swaa_config(num_layers=4)
            {'swaa_config': {'sliding_window_size': 64, 'keep_first': 0,
                             'force_fa_decode': False, 'non_sliding_layers': [1, 3]}}
        """
        return to_swaa_config(self, num_layers=num_layers)
