"""The types of the values in a `config.json`, checked before anything computes with them.

A file from elsewhere may have anything anywhere; what a field means and whether a family supports
its value is the families' matter.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

from swaa_jax.checkpoint.hf import TOKEN_IDS
from swaa_jax.fields import describe, show
from swaa_jax.limits import MAX_LAYERS, MAX_POSITIONS

HfConfig: TypeAlias = Mapping[str, Any]
"""The content of a `config.json`; `check_config_types` has seen the types of its values."""

_SHOWN = 10


def check_config_types(config: Mapping[str, object]) -> None:
    """Refuses values that no model could have; null and unknown fields pass.

    Raises:
        ValueError: every field whose value is of a wrong type or out of any range.

    Examples:
        >>> check_config_types({"vocab_size": "32k", "head_dim": None, "rms_norm_eps": 1e-6})
        Traceback (most recent call last):
        ValueError: config.vocab_size: expected a positive integer, got '32k' (str); ...
    """
    faults = [
        f"config.{show(field)[1:-1]}: expected {_KINDS[kind][0]}, got {describe(value)}"
        for field, kind, value in _typed(config)
        if value is not None and not _KINDS[kind][1](value)
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{'; '.join(faults[:_SHOWN])}{more}; correct config.json or the override")


def _typed(config: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    for kind, fields in _FIELDS.items():
        for field in fields:
            yield from _kinds(field, kind, config.get(field))
    for field in ("rope_scaling", "rope_parameters"):
        yield field, "object", config.get(field)
        yield from _rope(config.get(field), field)


def _rope(settings: object, where: str) -> Iterator[tuple[str, str, object]]:
    """The settings of a rope, or of one rope for each kind of layer."""
    if not isinstance(settings, Mapping):
        return
    for field, value in settings.items():
        if field in _ROPE_NUMBERS:
            yield from _kinds(f"{where}.{field}", "number", value)
        elif field == "rope_theta":
            yield from _kinds(f"{where}.{field}", "theta", value)
        elif field == "truncate":
            yield f"{where}.{field}", "flag", value
        elif field in ("rope_type", "type"):
            yield f"{where}.{field}", "text", value
        else:
            yield from _rope(value, f"{where}.{field}")


def _kinds(field: str, kind: str, value: object) -> Iterator[tuple[str, str, object]]:
    """The kind, with what follows from it: a theta is a number, and a number is float32's."""
    yield field, kind, value
    if kind == "theta":
        yield field, "number", value
    if kind in ("theta", "number"):
        yield field, "computable", value


def _is_integer(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_computable(value: Any) -> bool:
    """Neither zero nor infinite in float32. What is no number at all is told as such."""
    return not _is_number(value) or 1e-37 <= value <= 1e37


def _is_theta(value: Any) -> bool:
    """Wavelengths run from 2 pi to 2 pi theta: at 1 all are one, and below there are none."""
    return not _is_number(value) or value > 1


def _is_list(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(type(v) is kind for v in value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a positive integer", lambda value: _is_integer(value) and value > 0),
    "layers": (
        f"an integer from 1 to {MAX_LAYERS}",
        lambda value: _is_integer(value) and 0 < value <= MAX_LAYERS,
    ),
    "count": ("an integer of at least 0", lambda value: _is_integer(value) and value >= 0),
    "number": ("a positive number", _is_number),
    "computable": ("a number from 1e-37 to 1e37, which float32 holds", _is_computable),
    "theta": ("a number above 1", _is_theta),
    "context": (
        f"an integer from 1 to {MAX_POSITIONS}, beyond which positions share rotary angles",
        lambda value: _is_integer(value) and 0 < value <= MAX_POSITIONS,
    ),
    "flag": ("true or false", lambda value: type(value) is bool),
    "text": ("a text", lambda value: isinstance(value, str)),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
    "tokens": ("a token id or a list of them", lambda v: _is_integer(v) or _is_list(int)(v)),
    "texts": ("a list of texts", _is_list(str)),
    "integers": ("a list of integers", _is_list(int)),
}
_FIELDS = {
    "layers": ("num_hidden_layers",),
    "context": ("max_position_embeddings",),
    "theta": ("rope_theta", "rope_local_base_freq"),
    "size": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "original_max_position_embeddings",
        "sliding_window",
        "num_experts_per_tok",
        "decoder_sparse_step",
    ),
    "count": ("max_window_layers", "num_experts", "num_local_experts"),
    "number": (
        "rms_norm_eps",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    "flag": (
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "use_sliding_window",
        "norm_topk_prob",
        "use_bidirectional_attention",
        "is_causal",
    ),
    "text": ("model_type", "hidden_act", "hidden_activation"),
    "tokens": TOKEN_IDS,
    "texts": ("layer_types",),
    "integers": ("mlp_only_layers",),
}
_ROPE_NUMBERS = (
    "mscale",
    "mscale_all_dim",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
