"""The kernels of ``pallas_gpu``, for Hopper's tensor cores and copy engine.

Rows are cut into tiles, each with rows of one group, and columns into parts. A unit is a part of a
tile; with n blocks of threads, each takes every n-th. One warpgroup of it loads what up to two
others multiply, 64 rows each, and runs ahead through a ring of slots, into the next unit too::

    loads       x0 w0 | x1 w1 | x2 w2 | ...            D in steps
    computes          | x0 w0 | x1 w1 | ...  | stores
    computes          | x0 w0 | x1 w1 | ...  | stores

The copy engine moves eight rows at least, and rows of a group start anywhere. So a tile starts at
the multiple of eight before its group's rows, with ``low`` to ``high`` its own; what it computes
for the rows around those is not stored::

    rows      0 . . . . . . . 8 . . . . . . . 16
    groups    a a a a a b b b b b b c c
    tiles     [a a a a a - - - - - - - -]         a: 0 to 5
              [- - - - - b b b b b b - -]         b: 5 to 11
                              [- - - c c]         c: 3 to 5
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_gpu import plgpu

__all__ = ["ALIGNMENT", "LANES", "Tiles", "products", "weight_gradient"]

ALIGNMENT = 8
"""Rows that the copy engine moves together: tiles start at their multiples."""

LANES = 64
"""Columns that a swizzled row of shared memory holds: sizes of matrices are multiples."""

_ROWS = 64
"""Rows of a warpgroup: those of the tensor cores' products."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernels are cut.

    Attributes:
      rows: of a tile: 128, for two warpgroups that compute; or 64, or a smaller multiple of eight.
      columns: of the result, a multiple of 64, at most 256.
      depth: of a step along the inner axis, a multiple of 64 that divides it.
      num_stages: steps that shared memory holds at once.
      num_buffers: results of 64 columns that it holds for each warpgroup while they are copied on.
      num_blocks: blocks of threads, which share out the units.
      interpret: what ``plgpu.kernel`` takes to run without a GPU.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    num_stages: int = 4
    num_buffers: int = 1
    num_blocks: int = 132
    interpret: Any = False

    @property
    def warpgroups(self) -> int:
        """Those that compute."""
        return -(-self.rows // _ROWS)


def _swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory as the tensor cores read it."""
    transforms = (plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _call(
    kernel: Any,
    tiles: Tiles,
    out_type: Any,
    num_units: int,
    factors: tuple[tuple[int, int], tuple[int, int]],
    *args: Array,
) -> Array:
    """Runs a kernel, with the shared memory and barriers that both have; ``factors`` are the shapes
    of what a slot holds: for each warpgroup that computes, and for all.
    """
    groups, slots, dtype = tiles.warpgroups, tiles.num_stages, out_type.dtype

    def entry(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(kernel, *refs, tiles=tiles),
            _swizzled(slots, groups, *factors[0], dtype=dtype),
            _swizzled(slots, *factors[1], dtype=dtype),
            (
                _swizzled(groups, tiles.num_buffers, _ROWS, LANES, dtype=dtype),
                plgpu.SMEM((groups, _ROWS, LANES), dtype),
            ),
            plgpu.Barrier(num_arrivals=groups + 1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups),
            collective_axes="thread",
        )

    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(min(tiles.num_blocks, num_units),),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="thread",
        interpret=tiles.interpret,
    )(*args)


@functools.partial(jax.jit, static_argnums=0, static_argnames="transpose_w")
def products(
    tiles: Tiles,
    x: Float[Array, "M D"],
    w: Float[Array, "E _ _"],
    table: Int[Array, "T 4"],
    count: Int[Array, "1"],
    *,
    transpose_w: bool = False,
) -> Float[Array, "M F"]:
    """Each tile's rows times their group's matrix. Rows of no tile are not written.

    Args:
      tiles: of the kernel.
      x: M is a multiple of 8, D and F of 64.
      w: ``[E, D, F]``, or ``[E, F, D]`` with ``transpose_w``; in x's dtype, which has 16 bits.
      table: group, first row, and which of the tile's rows are the group's: from, to.
      count: of tiles.
    """
    inner, outer = (w.shape[2], w.shape[1]) if transpose_w else w.shape[1:]
    parts = -(-outer // tiles.columns)
    matrix = (tiles.columns, tiles.depth) if transpose_w else (tiles.depth, tiles.columns)
    return _call(
        functools.partial(
            _products, parts=parts, transpose_w=transpose_w, steps=inner // tiles.depth
        ),
        tiles,
        jax.ShapeDtypeStruct((x.shape[0], outer), x.dtype),
        table.shape[0] * parts,
        ((_ROWS, tiles.depth), matrix),
        x,
        w,
        table,
        count,
    )


def _products(
    # in, in device memory
    x_ref: Any,  # [M, D]
    w_ref: Any,  # [E, D, F] or [E, F, D]
    table_ref: Any,  # [T, 4]
    count_ref: Any,  # [1]
    # out
    out_ref: Any,  # [M, F]
    # in shared memory
    x: Any,  # [slots, warpgroups, 64, depth]
    w: Any,  # [slots, depth, columns], or the two the other way round
    out: Any,  # [warpgroups, buffers, 64, 64], swizzled, and [warpgroups, 64, 64], not
    filled: Any,  # barriers: a slot holds what was loaded
    freed: Any,  # and: it may be overwritten
    _: Any,
    *,
    tiles: Tiles,
    parts: int,
    steps: int,
    transpose_w: bool,
) -> None:
    thread, block = lax.axis_index("thread"), lax.axis_index("block")
    num_units = (count_ref[0] * parts - block + tiles.num_blocks - 1) // tiles.num_blocks
    slots, depth, columns = tiles.num_stages, tiles.depth, tiles.columns
    loaded = min(tiles.rows, _ROWS)

    def place(number: Any) -> tuple[Any, Any]:
        """A unit's tile and first column."""
        unit = block + number * tiles.num_blocks
        return unit // parts, unit % parts * columns

    @pl.when(thread == tiles.warpgroups)
    def _load() -> None:
        _fewer_registers(tiles)

        @pl.loop(0, num_units)
        def _unit(number: Any) -> None:
            tile, column = place(number)
            group, first = table_ref[tile, 0], pl.multiple_of(table_ref[tile, 1], ALIGNMENT)

            @pl.loop(0, steps)
            def _step(step: Any) -> None:
                slot = (number * steps + step) % slots
                plgpu.barrier_wait(freed.at[slot])
                there = pl.ds(step * depth, depth)
                for warpgroup in range(tiles.warpgroups):
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(first + warpgroup * _ROWS, loaded), there],
                        x.at[slot, warpgroup, pl.ds(0, loaded)],
                        filled.at[slot],
                    )
                part = pl.ds(column, columns)
                plgpu.copy_gmem_to_smem(
                    w_ref.at[group, part, there] if transpose_w else w_ref.at[group, there, part],
                    w.at[slot],
                    filled.at[slot],
                )

        _wait_for_all(freed, slots)

    @pl.when(thread < tiles.warpgroups)
    def _compute() -> None:
        _more_registers(tiles)
        _free_all(freed, slots)

        @pl.loop(0, num_units)
        def _unit(number: Any) -> None:
            tile, column = place(number)
            before = number * steps

            def multiply(sums_ref: Any) -> Any:
                @pl.loop(0, steps)
                def _step(step: Any) -> None:
                    slot = (before + step) % slots
                    plgpu.barrier_wait(filled.at[slot])
                    factor = w.at[slot].transpose((1, 0)) if transpose_w else w.at[slot]
                    plgpu.wgmma(sums_ref, x.at[slot, thread], factor)
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _free() -> None:
                        plgpu.barrier_arrive(freed.at[(before + step - 1) % slots])

                return sums_ref[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((_ROWS, columns), jnp.float32))
            plgpu.barrier_arrive(freed.at[(before + steps - 1) % slots])
            first = pl.multiple_of(table_ref[tile, 1], ALIGNMENT) + thread * _ROWS
            low, high = (
                jnp.clip(table_ref[tile, bound] - thread * _ROWS, 0, _ROWS) for bound in (2, 3)
            )
            values = sums.astype(x_ref.dtype)
            rows, single = pl.ds(first, _ROWS), out[1].at[thread]

            @pl.when((low == 0) & (high == _ROWS))
            def _store_all() -> None:
                _store(values, out[0].at[thread], out_ref, rows, column)

            @pl.when((low < high) & (high - low < _ROWS))
            def _store_some() -> None:
                # Single rows up to a multiple of eight, eights, and single rows.
                begin = jnp.minimum(high, (low + 7) // 8 * 8)
                end = jnp.maximum(begin, high // 8 * 8)

                def copy(at: Any, count: int, to: Any) -> None:
                    plgpu.copy_smem_to_gmem(
                        single.at[pl.ds(at, count)], out_ref.at[pl.ds(first + at, count), to]
                    )

                for at in range(0, columns, LANES):
                    to = pl.ds(column + at, LANES)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    single[...] = values[:, at : at + LANES]
                    plgpu.commit_smem()
                    pl.loop(low, begin)(lambda row, to=to: copy(row, 1, to))
                    pl.loop(begin // 8, end // 8)(lambda row, to=to: copy(row * 8, 8, to))
                    pl.loop(end, high)(lambda row, to=to: copy(row, 1, to))

        plgpu.wait_smem_to_gmem(0)


def _store(values: Any, memory: Any, out_ref: Any, rows: Any, column: Any) -> None:
    """Copies 64 rows of a result to device memory, 64 columns at a time."""
    buffers = memory.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result's, long ago
    for number in range(values.shape[1] // LANES):
        buffer = memory.at[number % buffers]
        if number >= buffers:
            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        at = number * LANES
        buffer[...] = values[:, at : at + LANES]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows, pl.ds(column + at, LANES)])


@functools.partial(jax.jit, static_argnums=0)
def weight_gradient(
    tiles: Tiles,
    x: Float[Array, "M D"],
    dy: Float[Array, "M F"],
    bounds: Int[Array, "E 2"],
) -> Float[Array, "E D F"]:
    """Each group's ``x^T dy``; zeros for groups without rows.

    Args:
      tiles: of the kernel, 64 columns of ``x`` for each warpgroup. A step is 64 rows.
      x, dy: M is a multiple of 8, D and F of 64. Rows of no group may hold anything.
      bounds: each group's first row, and the one after its last.
    """
    num_groups, inner, outer = bounds.shape[0], x.shape[1], dy.shape[1]
    parts = (-(-inner // (tiles.warpgroups * _ROWS)), -(-outer // tiles.columns))
    return _call(
        functools.partial(_weight_gradient, parts=parts, num_groups=num_groups),
        tiles,
        jax.ShapeDtypeStruct((num_groups, inner, outer), x.dtype),
        num_groups * parts[0] * parts[1],
        ((_ROWS, LANES), (_ROWS, tiles.columns)),
        x,
        dy,
        bounds,
    )


def _weight_gradient(
    # in, in device memory
    x_ref: Any,  # [M, D]
    dy_ref: Any,  # [M, F]
    bounds_ref: Any,  # [E, 2]
    # out
    out_ref: Any,  # [E, D, F]
    # in shared memory
    x: Any,  # [slots, warpgroups, 64, 64]
    dy: Any,  # [slots, 64, columns]
    out: Any,  # [warpgroups, buffers, 64, 64], swizzled, and one that is not used
    filled: Any,  # barriers: a slot holds what was loaded
    freed: Any,  # and: it may be overwritten
    hidden: Any,  # and: all warpgroups have hidden their share of the rows of other groups
    *,
    tiles: Tiles,
    parts: tuple[int, int],
    num_groups: int,
) -> None:
    thread, block = lax.axis_index("thread"), lax.axis_index("block")
    num_units = num_groups * parts[0] * parts[1]
    num_units = (num_units - block + tiles.num_blocks - 1) // tiles.num_blocks
    slots, columns, warpgroups = tiles.num_stages, tiles.columns, tiles.warpgroups

    def place(number: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
        """A unit's group, first row and column of its result; the group's rows, from a multiple of
        eight on, as the number of steps; and where in these its own rows start and end.
        """
        unit = block + number * tiles.num_blocks
        group, unit = unit // (parts[0] * parts[1]), unit % (parts[0] * parts[1])
        begin, end = bounds_ref[group, 0], bounds_ref[group, 1]
        first = begin // ALIGNMENT * ALIGNMENT
        steps = jnp.where(begin < end, (end - first + _ROWS - 1) // _ROWS, 0)
        row, column = unit // parts[1] * warpgroups * _ROWS, unit % parts[1] * columns
        return group, row, column, first, steps, (begin - first, end - first)

    @pl.when(thread == warpgroups)
    def _load() -> None:
        _fewer_registers(tiles)

        def unit(number: Any, before: Any) -> Any:
            _, row, column, first, steps, _ = place(number)

            @pl.loop(0, steps)
            def _step(step: Any) -> None:
                slot = (before + step) % slots
                plgpu.barrier_wait(freed.at[slot])
                rows = pl.ds(first + step * _ROWS, _ROWS)
                for warpgroup in range(warpgroups):
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[rows, pl.ds(row + warpgroup * _ROWS, LANES)],
                        x.at[slot, warpgroup],
                        filled.at[slot],
                    )
                plgpu.copy_gmem_to_smem(
                    dy_ref.at[rows, pl.ds(column, columns)], dy.at[slot], filled.at[slot]
                )

            return before + steps

        lax.fori_loop(0, num_units, unit, jnp.int32(0))
        _wait_for_all(freed, slots)

    @pl.when(thread < warpgroups)
    def _compute() -> None:
        _more_registers(tiles)
        _free_all(freed, slots)

        def hide(memory: Any, low: Any, high: Any) -> None:
            """Zeros in the rows of other groups, which may hold NaN."""
            row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, LANES), 0, layout=plgpu.Layout.WGMMA)
            values = plgpu.load(memory, layout=plgpu.Layout.WGMMA, optimized=False)
            zeros = jnp.zeros_like(values)
            memory[...] = jnp.where((row >= low) & (row < high), values, zeros)

        def unit(number: Any, before: Any) -> Any:
            group, row, column, _, steps, (low, high) = place(number)

            def multiply(sums_ref: Any) -> Any:
                @pl.loop(0, steps)
                def _step(step: Any) -> None:
                    slot = (before + step) % slots
                    plgpu.barrier_wait(filled.at[slot])
                    # Slots are as they were loaded until the last step lets go of them.
                    begin, end = low - step * _ROWS, high - step * _ROWS

                    @pl.when((begin > 0) | (end < _ROWS))
                    def _hide() -> None:
                        hide(x.at[slot, thread], begin, end)
                        for at in range(columns // LANES):

                            @pl.when(at % warpgroups == thread)
                            def _hide_part(at: int = at) -> None:
                                hide(dy.at[slot, :, pl.ds(at * LANES, LANES)], begin, end)

                        plgpu.commit_smem()
                        plgpu.barrier_arrive(hidden)
                        plgpu.barrier_wait(hidden)

                    plgpu.wgmma(sums_ref, x.at[slot, thread].transpose((1, 0)), dy.at[slot])
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _free() -> None:
                        plgpu.barrier_arrive(freed.at[(before + step - 1) % slots])

                return sums_ref[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((_ROWS, columns), jnp.float32))

            @pl.when(steps > 0)
            def _free() -> None:
                plgpu.barrier_arrive(freed.at[(before + steps - 1) % slots])

            rows = pl.ds(row + thread * _ROWS, _ROWS)

            @pl.when(row + thread * _ROWS < x_ref.shape[1])
            def _store_all() -> None:
                values = sums.astype(x_ref.dtype)
                _store(values, out[0].at[thread], out_ref.at[group], rows, column)

            return before + steps

        lax.fori_loop(0, num_units, unit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _fewer_registers(tiles: Tiles) -> None:
    # One warpgroup that computes leaves enough for both, and for other blocks.
    if tiles.warpgroups > 1:
        plgpu.set_max_registers(40, action="decrease")


def _more_registers(tiles: Tiles) -> None:
    if tiles.warpgroups > 1:
        plgpu.set_max_registers(232, action="increase")


def _free_all(freed: Any, slots: int) -> None:
    """All slots are free at first."""
    for slot in range(slots):
        plgpu.barrier_arrive(freed.at[slot])


def _wait_for_all(freed: Any, slots: int) -> None:
    """No barrier ends with a phase that nobody has waited for."""
    for slot in range(slots):
        plgpu.barrier_wait(freed.at[slot])
