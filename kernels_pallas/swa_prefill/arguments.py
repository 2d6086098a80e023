"""The validated arguments that every prefill backend takes, and the result it returns."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.checks import (
    check_booleans,
    check_heads,
    check_integers,
    check_mask,
    is_static,
)
from kernels_pallas.mask import IntOrPerRow, RowInfo, row_info

SAVED = "swa_prefill"
"""What ``jax.checkpoint``'s policies call a kernel's output and log-sum-exp, where it saves them.

A backward pass that has both computes nothing of the kernel again, only how q, k and v are laid
out.

>>> import jax
>>> policy = jax.checkpoint_policies.save_only_these_names(SAVED)  # of jax.checkpoint(function)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillArguments:
    """Arguments of ``swa_prefill``, checked here once: backends do not check them again.

    Raises:
      ValueError: names the wrong argument, what was expected and what came.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    window: IntOrPerRow | None
    num_sink_tokens: IntOrPerRow = 0
    q_full: Bool[Array, "B T"] | None = None
    lengths: Int[Array, " B"] | None = None
    segment_ids: Int[Array, "B S"] | None = None
    q_offset: IntOrPerRow = 0
    scale: float
    softcap: float | None = None
    return_lse: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        check_heads(self.q, self.k, self.v, names=("q", "k", "v"))
        num_batch, num_queries, num_keys = self.shape
        if num_keys < num_queries:
            raise ValueError(
                f"k: expected at least as many keys as queries (S >= T = {num_queries}), got S = "
                f"{num_keys}; pass the keys of the whole sequence and set q_offset"
            )
        last = num_keys - num_queries
        if is_static(self.q_offset) and not 0 <= int(self.q_offset) <= last:
            raise ValueError(
                f"q_offset: expected 0 <= q_offset <= S - T = {last}, got {self.q_offset}; query "
                "row t has absolute index q_offset + t and needs its own key"
            )
        check_integers("q_offset", self.q_offset, (), (num_batch,))
        check_integers("lengths", self.lengths, (num_batch,))
        check_integers("segment_ids", self.segment_ids, (num_batch, num_keys))
        check_booleans("q_full", self.q_full, (num_batch, num_queries))
        check_mask(
            num_batch,
            window=self.window,
            num_sink_tokens=self.num_sink_tokens,
            softcap=self.softcap,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, T, S)``."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    def rows(self) -> RowInfo:
        """Positions, segments, fullness and validity of the rows."""
        return row_info(
            shape=self.shape,
            lengths=self.lengths,
            segment_ids=self.segment_ids,
            q_offset=self.q_offset,
            q_full=self.q_full,
        )


def without_padding(arguments: PrefillArguments, rows: RowInfo) -> tuple[Array, Array, Array]:
    """q, k, v with zeros where no valid row looks: it may hold NaN, and NaN * 0 is NaN."""
    q, k, v = arguments.q, arguments.k, arguments.v
    _, num_queries, num_keys = arguments.shape
    if arguments.lengths is not None:
        q = jnp.where(rows.q_valid[:, :, None, None], q, 0)
    if arguments.lengths is not None or num_keys > num_queries:
        last_B1 = jnp.max(jnp.where(rows.q_valid, rows.q_index, -1), axis=1, keepdims=True)
        reached = (jnp.arange(num_keys) <= last_B1)[:, :, None, None]
        k, v = jnp.where(reached, k, 0), jnp.where(reached, v, 0)
    return q, k, v
