"""The validated arguments that every backend of ``grouped_matmul`` takes."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmulArguments:
    """Arguments of ``grouped_matmul`` after validation; backends do not check them again."""

    x: Float[Array, "M D"]
    w: Float[Array, "E D F"]
    group_sizes: Int[Array, " E"]
    rows_per_group: int
    target: Target | None = None


def validate(arguments: GroupedMatmulArguments) -> None:
    """Raise ``ValueError`` naming the wrong argument, what was expected and what came."""
    x, w, group_sizes = arguments.x, arguments.w, arguments.group_sizes
    for name, array, axes in (("x", x, "[M, D]"), ("w", w, "[E, D, F]")):
        if array.ndim != axes.count(",") + 1:
            raise ValueError(f"{name}: expected axes {axes}, got shape {array.shape}")
        if array.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: expected float32, bfloat16 or float16, got {array.dtype}; cast it"
            )
    if w.dtype != x.dtype:
        raise ValueError(f"w: expected x's dtype {x.dtype}, got {w.dtype}; cast one")
    if w.shape[1] != x.shape[1]:
        raise ValueError(f"w: expected D = {x.shape[1]} like x, got shape {w.shape}")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes: expected {w.shape[0]} integers, one a group of w, "
            f"got shape {group_sizes.shape}, dtype {group_sizes.dtype}"
        )


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Float32 products are whole: some devices' default rounds the operands to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


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
