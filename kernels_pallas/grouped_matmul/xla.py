"""Any device: a loop over tiles of rows, each with its own group's matrix.

``jax.lax.ragged_dot`` would be shorter. On the CPU it computes every row with every group's matrix
and keeps ``[E, M, D]`` copies of the rows, as its compiled program shows (JAX 0.10.2).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import no_limits
from kernels_pallas.grouped_matmul.arguments import (
    GroupedMatmulArguments,
    row_tile,
    zero_rows_of_no_group,
)
from kernels_pallas.grouped_matmul.gradient import differentiable
from kernels_pallas.layout import pad_end, precision_of

_LARGEST_TILE = 256


limits = no_limits


def compute(arguments: GroupedMatmulArguments) -> Float[Array, "M F"]:
    """Does work in proportion to the rows of all groups, rounded up to tiles."""
    tile = row_tile(arguments.rows_per_group, largest=_LARGEST_TILE)
    return _grouped(arguments.x, arguments.w, arguments.group_sizes, tile)


class _Tiles:
    """The list of work: tile ``i`` is rows ``start .. start + size`` of ``group``.

    Groups are cut from their own first row on, so a group's last tile reaches into the next one:

        rows    0 1 2 3 4 5 6 7 8 9
        groups  a a a a a b b b c c
        tiles   [a . . .]
                        [a b b b]       writes b's rows too, and
                          [b . . .]     b's own tile, which comes later, writes them again
                                [c . . .]
    """

    def __init__(self, size: int, group_sizes: Int[Array, " E"]):
        self.size = size
        self._ends = jnp.cumsum(group_sizes)
        self._starts = self._ends - group_sizes
        self._counts = jnp.cumsum((group_sizes + self.size - 1) // self.size)
        self.count = self._counts[-1]

    def pad(self, x: Float[Array, "M D"]) -> Float[Array, "rows D"]:
        """Pads the rows: the last tile may reach beyond them, where a slice would move back."""
        return pad_end(x, self.size, axis=0)

    def locate(self, index: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """``group``, ``start``, and which of the tile's rows are the group's, ``[size, 1]``."""
        group = jnp.searchsorted(self._counts, index, side="right").astype(jnp.int32)
        before = jnp.where(group > 0, self._counts[group - 1], 0)
        start = self._starts[group] + (index - before) * self.size
        mine = lax.broadcasted_iota(jnp.int32, (self.size, 1), 0) < self._ends[group] - start
        return group, start, mine


@functools.partial(jax.jit, static_argnames=("tile", "transpose_w"))
def _product(
    x: Array, w: Array, group_sizes: Array, tile: int, *, transpose_w: bool = False
) -> Array:
    tiles = _Tiles(tile, group_sizes)
    rows = tiles.pad(x)
    contracted = (((1,), (1 if transpose_w else 0,)), ((), ()))

    def step(index: Array, out: Array) -> Array:
        group, start, _ = tiles.locate(index)
        part = lax.dynamic_slice_in_dim(rows, start, tile)
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
        y = lax.dot_general(
            part,
            matrix,
            contracted,
            precision=precision_of(x),
            preferred_element_type=jnp.float32,
        )
        return lax.dynamic_update_slice_in_dim(out, y.astype(x.dtype), start, 0)

    out = jnp.zeros((rows.shape[0], w.shape[1 if transpose_w else 2]), x.dtype)
    out = lax.fori_loop(0, tiles.count, step, out)[: x.shape[0]]
    return zero_rows_of_no_group(out, group_sizes)


@functools.partial(jax.jit, static_argnames="tile")
def _weight_gradient(x: Array, dy: Array, group_sizes: Array, tile: int) -> Array:
    tiles = _Tiles(tile, group_sizes)
    rows, dy_rows = tiles.pad(x), tiles.pad(dy)

    def step(index: Array, dw: Array) -> Array:
        group, start, mine = tiles.locate(index)
        part = lax.dot_general(
            jnp.where(mine, lax.dynamic_slice_in_dim(rows, start, tile), 0),
            jnp.where(mine, lax.dynamic_slice_in_dim(dy_rows, start, tile), 0),
            (((0,), (0,)), ((), ())),
            precision=precision_of(x),
            preferred_element_type=jnp.float32,
        )
        so_far = lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, so_far + part, group, 0)

    dw = jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
    return lax.fori_loop(0, tiles.count, step, dw).astype(x.dtype)


_grouped = differentiable(_product, _weight_gradient)
