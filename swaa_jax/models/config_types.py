"""The types of the values in a `config.json`, checked before anything computes with them.

A file from elsewhere may have anything anywhere; what a field means and whether a family supports
its value is the families' matter.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

from swaa_jax.fields import describe
from swaa_jax.limits import MAX_LAYERS

HfConfig: TypeAlias = Mapping[str, Any]
"""The content of a `config.json`; `check_config_types` has seen the types of its values."""


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
        f"config.{field}: expected {_KINDS[kind][0]}, got {describe(value)}"
        for field, kind, value in _typed(config)
        if value is not None and not _KINDS[kind][1](value)
    ]
    if faults:
        raise ValueError(f"{'; '.join(faults)}; correct config.json or the override")


def _typed(config: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    for kind, fields in _FIELDS.items():
        for field in fields:
            yield field, kind, config.get(field)
    for field in ("rope_scaling", "rope_parameters"):
        yield field, "object", config.get(field)
        yield from _rope(config.get(field), field)


def _rope(settings: object, where: str) -> Iterator[tuple[str, str, object]]:
    """The settings of a rope, or of one rope for each kind of layer."""
    if not isinstance(settings, Mapping):
        return
    for field, value in settings.items():
        if field in _ROPE_NUMBERS:
            yield f"{where}.{field}", "number", value
        elif field in ("rope_type", "type"):
            yield f"{where}.{field}", "text", value
        else:
            yield from _rope(value, f"{where}.{field}")


def _is_integer(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


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
    "flag": ("true or false", lambda value: type(value) is bool),
    "text": ("a text", lambda value: isinstance(value, str)),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
    "tokens": ("a token id or a list of them", lambda v: _is_integer(v) or _is_list(int)(v)),
    "texts": ("a list of texts", _is_list(str)),
    "integers": ("a list of integers", _is_list(int)),
}
_FIELDS = {
    "layers": ("num_hidden_layers",),
    "size": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
        "num_experts_per_tok",
        "decoder_sparse_step",
    ),
    "count": ("max_window_layers", "num_experts", "num_local_experts"),
    "number": (
        "rms_norm_eps",
        "rope_theta",
        "rope_local_base_freq",
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
    ),
    "text": ("model_type", "hidden_act", "hidden_activation"),
    "tokens": ("bos_token_id", "eos_token_id", "pad_token_id"),
    "texts": ("layer_types",),
    "integers": ("mlp_only_layers",),
}
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
