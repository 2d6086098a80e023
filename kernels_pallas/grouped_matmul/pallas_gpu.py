"""The ``pallas_gpu`` backend: kernels for Hopper GPUs, through Pallas's Mosaic GPU.

Forward and both gradients read rows where they lie: groups may start anywhere, be empty, and leave
rows over. The work is listed in a table made of the groups' sizes, in arithmetic that XLA fuses.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import pallas_gpu_kernels as kernels
from kernels_pallas.grouped_matmul.arguments import GroupedMatmulArguments, zero_rows_of_no_group
from kernels_pallas.grouped_matmul.gradient import differentiable
from kernels_pallas.layout import pad_end
from kernels_pallas.mosaic_gpu import hopper_limits


def limits(arguments: GroupedMatmulArguments) -> tuple[str, ...]:
    """What the kernels cannot compute, or not here."""
    return tuple(hopper_limits("x", arguments.x.dtype, target=arguments.target))


def compute(arguments: GroupedMatmulArguments) -> Float[Array, "M F"]:
    """Reads each group's matrix once for every tile of its rows, from a cache where tiles are many.

    The kernels take D and F in multiples of 64: others are filled up with zeros, in copies.
    """
    plan = Plan(rows_per_group=arguments.rows_per_group)
    return grouped(arguments.x, arguments.w, arguments.group_sizes, plan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a product is cut.

    Attributes:
      rows_per_group: of a mean group.
      changes: values of fields of ``Tiles`` in place of the chosen ones.
    """

    rows_per_group: int
    changes: tuple[tuple[str, Any], ...] = ()

    def tiles(self, inner: int, outer: int) -> kernels.Tiles:
        """Of a product with ``[inner, outer]`` matrices.

        Few rows: parts are narrow, so that the chip has enough blocks to read the matrices at its
        memory's speed, several on a multiprocessor. Many: as large as the registers hold.
        """
        if self.rows_per_group <= 32:
            depth = 128 if inner % 128 == 0 else 64
            tiles = kernels.Tiles(rows=64, columns=64, depth=depth, num_stages=4, num_blocks=264)
        else:
            tiles = kernels.Tiles(columns=_columns(outer))
        return dataclasses.replace(tiles, **dict(self.changes))

    def gradient_tiles(self, outer: int) -> kernels.Tiles:
        """Of the matrices' gradient."""
        return dataclasses.replace(kernels.Tiles(columns=_columns(outer)), **dict(self.changes))


def _columns(outer: int) -> int:
    """The width that pads least, the wider first."""
    return min((256, 192, 128, 64), key=lambda width: -(-outer // width) * width)


def tile_table(
    group_sizes: Int[Array, " E"], *, rows: int, num_rows: int
) -> tuple[Int[Array, "T 4"], Int[Array, "1"]]:
    """The tiles of all groups, as ``pallas_gpu_kernels.products`` takes them, and their number.

    Sums over all groups, rather than scans and gathers, since XLA makes two kernels of them.
    """
    num_groups, align = group_sizes.shape[0], kernels.ALIGNMENT
    sizes = group_sizes.astype(jnp.int32)
    number = jnp.arange(num_groups, dtype=jnp.int32)
    before = number[:, None] > number  # [of, other]

    begins = jnp.sum(jnp.where(before, sizes, 0), axis=1)
    lost = begins % align
    counts = jnp.where(sizes > 0, (lost + sizes + rows - 1) // rows, 0)
    ends = jnp.sum(jnp.where(before, counts, 0), axis=1) + counts

    few = min(num_groups, num_rows)  # groups with rows
    tile = jnp.arange((num_rows + (align - 1) * few) // rows + few, dtype=jnp.int32)[:, None]
    index = tile - (ends - counts)
    mine = (index >= 0) & (index < counts)

    first = begins - lost + index * rows
    low, high = jnp.maximum(begins - first, 0), jnp.minimum(begins + sizes - first, rows)
    columns = (jnp.broadcast_to(number, mine.shape), first, low, high)
    table = jnp.stack([jnp.sum(jnp.where(mine, x, 0), axis=1) for x in columns], axis=1)
    return table, ends[-1:]


def _padded(x: Array, *multiples: int) -> Array:
    """Zeros behind the last axes, up to multiples of these; the array itself if it is whole."""
    for axis, multiple in zip(range(x.ndim - len(multiples), x.ndim), multiples, strict=True):
        if x.shape[axis] % multiple:
            x = pad_end(x, -x.shape[axis] % multiple, axis=axis)
    return x


@functools.partial(jax.jit, static_argnames=("plan", "transpose_w"))
def _product(
    x: Array, w: Array, group_sizes: Array, plan: Plan, *, transpose_w: bool = False
) -> Array:
    num_rows, outer = x.shape[0], w.shape[1 if transpose_w else 2]
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((num_rows, outer), x.dtype)
    x = _padded(x, kernels.ALIGNMENT, kernels.LANES)
    w = _padded(w, kernels.LANES, kernels.LANES)
    tiles = plan.tiles(x.shape[1], w.shape[1 if transpose_w else 2])
    table, count = tile_table(group_sizes, rows=tiles.rows, num_rows=num_rows)
    out = kernels.products(tiles, x, w, table, count, transpose_w=transpose_w)
    return zero_rows_of_no_group(out[:num_rows, :outer], group_sizes)


@functools.partial(jax.jit, static_argnames="plan")
def _weight_gradient(x: Array, dy: Array, group_sizes: Array, plan: Plan) -> Array:
    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    if 0 in (*shape, x.shape[0]):
        return jnp.zeros(shape, x.dtype)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.stack([ends - group_sizes.astype(jnp.int32), ends], axis=1)
    x, dy = (_padded(each, kernels.ALIGNMENT, kernels.LANES) for each in (x, dy.astype(x.dtype)))
    dw = kernels.weight_gradient(plan.gradient_tiles(dy.shape[1]), x, dy, bounds)
    return dw[:, : shape[1], : shape[2]]


grouped = differentiable(_product, _weight_gradient)
