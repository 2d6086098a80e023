"""The validated arguments that every backend of ``grouped_matmul`` takes."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.checks import check_floats, check_integers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmulArguments:
    """Arguments of ``grouped_matmul``, checked here once: backends do not check them again.

    Raises:
      ValueError: names the wrong argument, what was expected and what came.
    """

    x: Float[Array, "M D"]
    w: Float[Array, "E D F"]
    group_sizes: Int[Array, " E"]
    rows_per_group: int
    target: Target | None = None

    def __post_init__(self) -> None:
        x, w = self.x, self.w
        check_floats("x", x, "[M, D]")
        check_floats("w", w, "[E, D, F]", like=("x", x))
        if w.shape[1] != x.shape[1]:
            raise ValueError(f"w: expected D = {x.shape[1]} like x, got shape {w.shape}")
        if w.shape[0] == 0:
            raise ValueError(f"w: expected at least one group, got shape {w.shape}")
        check_integers("group_sizes", self.group_sizes, (w.shape[0],))
        if self.rows_per_group < 0:
            raise ValueError(f"rows_per_group: expected at least 0, got {self.rows_per_group}")


def row_tile(rows_per_group: int, *, largest: int) -> int:
    """Rows that a step of work takes: a power of two from 16 to ``largest``.

    Groups do not start and end at the edges of tiles, so each group may cost up to a tile more than
    its rows: a tile is at most a sixth of the mean group, which bounds the waste by a sixth, except
    where groups are so small that 16 rows are more than that.
    """
    tile = 16
    while tile * 2 <= min(largest, rows_per_group // 6):
        tile *= 2
    return tile


def zero_rows_of_no_group(
    out: Float[Array, "M F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Zeros in the rows after the last group, whatever they hold."""
    row_M = lax.broadcasted_iota(jnp.int32, (out.shape[0], 1), 0)
    return jnp.where(row_M < jnp.sum(group_sizes), out, jnp.zeros((), out.dtype))
