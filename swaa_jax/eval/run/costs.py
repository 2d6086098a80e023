"""What a cell's answers took: measured, and counted.

Times are measured while the answers are made, without compilation. Operations and pairs are counted
by `swaa_jax.costs`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from swaa_jax.costs import ModelFlops, Runs, visible_pairs
from swaa_jax.eval.run.store import AnswerRecord
from swaa_jax.infer import Timings
from swaa_jax.models import CausalLM
from swaa_jax.policy import LayerAttention

__all__ = ["CellCost", "cell_cost", "remote_cost"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellCost:
    """What one cell cost; values are None where nothing was measured, or a server does not tell.

    Attributes:
        prefill_tokens_per_second: prompt tokens that were read, not reused.
        decode_tokens_per_second: new tokens of all rows of a batch together.
        ms_per_token: of one decode step, in which every row gains a token.
        cache_bytes_per_sample: keys and values as allocated, of one slot.
        prefill_share: (query, key) pairs of the prompts, as a part of full attention's.
        prefill_flops: operations that reading one prompt takes, the mean over the prompts.
        seconds_per_request: of a server, from a request to the whole answer, the mean.
        left_out: fields that the server did not take.
    """

    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    ms_per_token: float | None
    cache_bytes_per_sample: int | None
    prefill_share: float | None
    prefill_flops: float | None
    seconds_per_request: float | None = None
    left_out: tuple[str, ...] = ()

    def numbers(self) -> dict[str, float | None]:
        """The costs by name, as tables have them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-1]}

    @property
    def is_local(self) -> bool:
        """Whether the answers were made in this process."""
        return self.prefill_share is not None


def cell_cost(
    model: CausalLM,
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
    runs = [Runs.of_text(length) for length in list(prompt_lengths) or [1]]
    model_flops, heads = ModelFlops.of(model), model.config.num_kv_heads
    seen = sum(visible_pairs(layers, one, num_kv_heads=heads) for one in runs)
    full = sum(visible_pairs([LayerAttention()] * len(layers), one) for one in runs)
    flops = sum(model_flops.forward(layers, one, num_logits=1) for one in runs)
    per_step = None if timings is None else timings.time_per_output_token_s
    decoded = 0 if timings is None else timings.decoded_tokens
    return CellCost(
        prefill_tokens_per_second=None if timings is None else timings.prefill_tokens_per_second,
        decode_tokens_per_second=(
            decoded / timings.decode_s if timings is not None and timings.decode_s > 0 else None
        ),
        ms_per_token=None if per_step is None else 1e3 * per_step,
        cache_bytes_per_sample=None if timings is None else timings.cache_bytes_per_row,
        prefill_share=seen / full,
        prefill_flops=flops / len(runs),
    )


def remote_cost(answers: Sequence[AnswerRecord]) -> CellCost:
    """The costs of a cell that a server answered: what a client can see of them."""
    seconds = [one["seconds"] for one in answers if one.get("seconds") is not None]
    unknown: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(CellCost))
    left_out = {name for one in answers for name in one.get("left_out", ())}
    known = {
        "seconds_per_request": sum(seconds) / len(seconds) if seconds else None,
        "left_out": tuple(sorted(left_out)),
    }
    return CellCost(**{**unknown, **known})
