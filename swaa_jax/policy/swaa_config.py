"""The configuration of the paper's reference code, to and from a policy's fields.

::

    {"swaa_config": {"sliding_window_size": 2000, "keep_first": 10, "force_fa_decode": true,
                     "non_sliding_layers": [1, 3, 5]}, "model_list": ["Qwen3-4B"]}
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.documents import parse_json
from swaa_jax.fields import check_keys, describe, integer, naming, wrong
from swaa_jax.policy.layers import LayerSelection, format_layers, layer_selection, resolve_layers
from swaa_jax.storage import read_text
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from swaa_jax.policy.policy import AttentionPolicy

__all__ = ["SWAA_CONFIG_KEYS", "from_swaa_config", "to_swaa_config"]

SWAA_CONFIG_KEYS = ("sliding_window_size", "keep_first", "force_fa_decode", "non_sliding_layers")


def from_swaa_config(
    config: Mapping[str, object] | PathLike, *, num_layers: int | None
) -> dict[str, Any]:
    """A policy's fields; see `AttentionPolicy.from_swaa_config`."""
    if not isinstance(config, Mapping):
        path = epath.Path(config)
        with naming(path):
            document = _one_setting(parse_json(read_text(path)))
            return from_swaa_config(document, num_layers=num_layers)
    if "swaa_config" in config:
        check_keys("SWAA setting", config, ("swaa_config", "model_list"))
        return from_swaa_config(_one_setting(config["swaa_config"]), num_layers=num_layers)
    check_keys("SWAA config", config, SWAA_CONFIG_KEYS)
    if config.get("sliding_window_size") is None:
        return {}  # full attention: the reference then ignores the other settings
    full_layers = _layers("non_sliding_layers", config.get("non_sliding_layers"))
    decode = config.get("force_fa_decode")
    if decode is None or isinstance(decode, bool):
        decode = "full" if decode else "window"
    else:
        decode = _layers("force_fa_decode", decode)
    if num_layers is not None:
        dropped = {layer for layer in full_layers if layer >= num_layers}
        full_layers = tuple(layer for layer in full_layers if layer not in dropped)
        if isinstance(decode, tuple):
            dropped.update(layer for layer in decode if layer >= num_layers)
            decode = tuple(layer for layer in decode if layer < num_layers)
        if dropped:
            warnings.warn(
                f"SWAA config: dropped layers {format_layers(sorted(dropped))}, which a model "
                f"with {num_layers} layers does not have.",
                stacklevel=3,
            )
    return {
        "window": integer(least=1)("sliding_window_size", config["sliding_window_size"]),
        "num_sink_tokens": integer(least=0)("keep_first", config.get("keep_first") or 0),
        "full_attention_layers": full_layers,
        "decode": decode,
    }


def to_swaa_config(policy: "AttentionPolicy", *, num_layers: int | None) -> dict[str, object]:
    """See `AttentionPolicy.to_swaa_config`."""
    for name in ("full_attention_heads", "full_attention_tail"):
        if getattr(policy, name):
            raise ValueError(
                f"{name}: expected none, which the reference's configuration cannot express, got "
                f"{describe(getattr(policy, name))}; leave it out to export the rest"
            )

    def explicit(name: str, layers: LayerSelection) -> list[int]:
        if num_layers is not None:
            return sorted(resolve_layers(name, layers, num_layers))
        if isinstance(layers, str) or any(layer < 0 for layer in layers):
            raise ValueError(
                f"{name}: expected explicit layers from 0, which the reference takes, got "
                f"{format_layers(layers)}, which depends on the model's depth; pass num_layers"
            )
        return list(layers)

    is_same_everywhere = policy.decode in ("full", "window")
    return {
        "swaa_config": {
            "sliding_window_size": policy.window,
            "keep_first": policy.num_sink_tokens,
            "force_fa_decode": policy.decode == "full"
            if is_same_everywhere
            else explicit("decode", policy.decode),
            "non_sliding_layers": explicit("full_attention_layers", policy.full_attention_layers),
        }
    }


def _layers(name: str, value: object) -> tuple[int, ...]:
    """An explicit list of layers; the reference has no slices, and no layers from the end."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise wrong(name, "a list of layers", value)
    layers = layer_selection(name, value)
    if any(not isinstance(layer, int) or layer < 0 for layer in layers):
        raise wrong(name, "layers from 0 up", value)
    return tuple(int(layer) for layer in layers)


def _one_setting(document: object) -> Mapping[str, object]:
    """The reference keeps its settings in lists; a policy is one of them."""
    if isinstance(document, Mapping):
        return document
    if isinstance(document, Sequence) and not isinstance(document, str):
        if len(document) == 1:
            return _one_setting(document[0])
        raise ValueError(
            f"SWAA config: expected one setting, got a list of {len(document)}; pass the entry "
            "that you want, AttentionPolicy.from_swaa_config(settings[i])"
        )
    raise wrong("SWAA config", "a mapping", document)
