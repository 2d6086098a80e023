"""What a cell's answers took: measured, and counted.

Times are measured while the answers are made, without compilation. Operations are those of the
mathematics, as MFU counts them: a product of [m, k] and [k, n] is 2 m k n, attention counts the
(query, key) pairs that are visible.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from swaa_jax.attention import split_heads
from swaa_jax.costs import active_parameters
from swaa_jax.infer import Timings
from swaa_jax.policy import LayerAttention

__all__ = ["CellCost", "cell_cost", "prefill_attention_share", "prefill_flops"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellCost:
    """Of one cell; measured values are None where nothing was measured.

    Attributes:
        prefill_tokens_per_second: prompt tokens; policies that share a prefill share this.
        decode_tokens_per_second: new tokens of all rows of a batch together.
        ms_per_token: of one decode step, in which every row gains a token.
        cache_bytes_per_sample: keys and values as allocated (prompt and answer buckets).
        prefill_share: (query, key) pairs of the prompts, as a part of full attention's.
        prefill_flops: operations that reading one prompt takes, the mean over the prompts.
    """

    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    ms_per_token: float | None
    cache_bytes_per_sample: int | None
    prefill_share: float
    prefill_flops: float


def cell_cost(
    model: Any,
    layers: Sequence[LayerAttention],
    *,
    prompt_lengths: Sequence[int],
    timings: Timings | None,
) -> CellCost:
    """The costs of a cell.

    Args:
        model: the model that answered.
        layers: its policy, resolved.
        prompt_lengths: tokens of each prompt.
        timings: of all its batches; None: there were none.
    """
    lengths = list(prompt_lengths) or [1]
    flops = {length: prefill_flops(model, layers, length) for length in set(lengths)}
    pairs = {length: length * (length + 1) / 2 for length in flops}
    heads = model.config.num_kv_heads
    seen = {
        length: pairs[length] * prefill_attention_share(layers, length, num_kv_heads=heads)
        for length in flops
    }
    per_step = None if timings is None else timings.time_per_output_token_s
    decoded = 0 if timings is None else timings.new_tokens - timings.num_rows  # the first is drawn
    return CellCost(
        prefill_tokens_per_second=None if timings is None else timings.prefill_tokens_per_second,
        decode_tokens_per_second=(
            decoded / timings.decode_s if timings is not None and timings.decode_s > 0 else None
        ),
        ms_per_token=None if per_step is None else 1e3 * per_step,
        cache_bytes_per_sample=None if timings is None else timings.cache_bytes_per_row,
        prefill_share=sum(seen[n] for n in lengths) / sum(pairs[n] for n in lengths),
        prefill_flops=sum(flops[length] for length in lengths) / len(lengths),
    )


def prefill_flops(model: Any, layers: Sequence[LayerAttention], length: int) -> float:
    """Operations that reading a prompt of `length` tokens takes, its next-token logits included."""
    config = model.config
    width = config.num_heads * config.head_dim
    share = prefill_attention_share(layers, length, num_kv_heads=config.num_kv_heads)
    pairs = len(layers) * share * length * (length + 1) / 2
    head = 2 * config.hidden_size * config.vocab_size  # of the last token only
    return 2 * active_parameters(model) * length + 4 * width * pairs + head


def prefill_attention_share(
    layers: Sequence[LayerAttention], length: int, *, num_kv_heads: int | None = None
) -> float:
    """The (query, key) pairs that `length` prompt tokens visit, as a part of full attention's.

    A windowed row i sees min(i + 1, window + sinks) keys: the measure of prefill work that neither
    machine nor model size changes.

    Args:
        layers: of the model, under a policy.
        length: tokens.
        num_kv_heads: the model's, where a layer has full heads.

    Raises:
        ValueError: a layer has full heads, and their number is not known to be out of how many.

    >>> prefill_attention_share([LayerAttention(window=1), LayerAttention()], 3)
    0.75
    """
    full = length * (length + 1) / 2

    def pairs(layer: LayerAttention) -> float:
        if layer.full_heads:
            if num_kv_heads is None:
                raise ValueError(
                    "num_kv_heads: expected the model's number of KV heads for a layer with full "
                    f"heads {layer.full_heads}, got None"
                )
            parts = split_heads(layer, num_kv_heads)
            return sum(len(part.heads) * pairs(part.layer) for part in parts) / num_kv_heads
        if layer.window is None:
            return full
        windowed = length - min(layer.full_attention_tail, length)
        reach = layer.window + layer.num_sink_tokens
        growing = min(windowed, reach)
        below = growing * (growing + 1) / 2 + (windowed - growing) * reach
        return below + full - windowed * (windowed + 1) / 2

    return sum(pairs(layer) for layer in layers) / (full * len(layers))
