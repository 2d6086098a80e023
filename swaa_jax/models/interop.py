"""Attention policies in `config.json`: what stock Transformers can be told, family by family.

A family says in `hf_windows` how it stores windows, or why it cannot; what no family can store
(sink tokens, full heads, FA decode, a full tail) is refused here. docs/interop.md has the table.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swaa_jax.policy import AttentionPolicy

if TYPE_CHECKING:
    from swaa_jax.models.config import DecoderConfig

FULL, WINDOWED = "full_attention", "sliding_attention"
"""What Transformers calls the two kinds of layers."""


def attention_fields(config: "DecoderConfig", policy: AttentionPolicy) -> dict[str, object]:
    """The fields of `config.json` under which stock Transformers runs `policy`.

    Args:
        config: a `DecoderConfig`; its `hf_windows` knows the family.
        policy: what each token may see.

    Raises:
        NotImplementedError: every part that the family cannot express, with the reason.
    """
    layers = policy.resolve(config.num_layers, num_kv_heads=config.num_kv_heads)
    windowed = [layer for layer in layers if not layer.is_full]
    refused = []
    if any(layer.num_sink_tokens for layer in windowed):
        refused.append(f"num_sink_tokens={policy.num_sink_tokens}: it has no sink tokens")
    if any(layer.full_decode for layer in windowed):
        refused.append("decode: its mask does not tell answer tokens from the prompt's")
    if any(layer.full_attention_tail for layer in windowed):
        refused.append("full_attention_tail: its mask does not know where the prompt ends")
    if any(layer.full_heads for layer in windowed):
        refused.append("full_attention_heads: it windows all heads of a layer or none")
    fields: dict[str, object] = {}
    try:
        kinds = tuple(FULL if layer.is_full else WINDOWED for layer in layers)
        fields = config.hf_windows(kinds, windowed[0].window if windowed else None)
    except NotImplementedError as error:
        refused.append(str(error))
    if refused:
        raise NotImplementedError(
            f"policy ({policy}): expected what Transformers' {config.architecture} can express, "
            f"got {'; '.join(refused)}; run it with this package, or choose a policy without that"
        )
    return fields


def kinds_fields(kinds: Sequence[str], window: int | None) -> dict[str, object]:
    """Qwen2's and Qwen3's way: a kind for each layer, and a switch."""
    num_full = kinds.index(WINDOWED) if WINDOWED in kinds else len(kinds)
    prefix = all(kind == WINDOWED for kind in kinds[num_full:])
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": list(kinds),
        # Read by versions without layer_types; where they cannot know, they window no layer.
        "max_window_layers": num_full if prefix else len(kinds),
    }


def one_window(kinds: Sequence[str], window: int | None) -> int | None:
    """The window that all layers share, None if all are full.

    Raises:
        NotImplementedError: the layers differ.
    """
    if len(set(kinds)) > 1:
        full = [index for index, kind in enumerate(kinds) if kind == FULL]
        raise NotImplementedError(
            f"full_attention_layers={full}: it has one window for all layers or none"
        )
    return window
