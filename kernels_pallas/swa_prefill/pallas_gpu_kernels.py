"""The kernel of ``pallas_gpu``, for Hopper's tensor cores and copy engine.

A tile is 128 rows of one KV head's queries: 64 rows of two heads, or 128 rows of one head where the
group is odd. Two warpgroups compute 64 of them each, and a third loads what both read::

    loads       q | k0 v0 | k1 v1 | k2 v2 | ...         into rings of slots, as they become free
    computes      | q k0  softmax  p v0 | q k1  softmax  p v1 | ...
    computes            | q k0  softmax  p v0 | q k1  softmax ...     half a step behind it

so that the tensor cores multiply for one of them while the other takes exponentials. A block of
threads may stay for many tiles, and the loads run ahead into the next one.

The keys of a tile are visited by blocks, those of which some are hidden from some row first::

    keys      sinks   .    . window . . . . . . . . . .
            [ masked |    | masked | whole  whole | masked ]
    visited     0              1       3      4       2
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import LOWEST
from kernels_pallas.mask import BlockMap
from kernels_pallas.mosaic_gpu import plgpu

__all__ = ["HEAD_MULTIPLE", "Shape", "Static", "Tiles", "attend", "choose_tiles", "step_table"]

HEAD_MULTIPLE = 64
"""Of which head dims are multiples: what a swizzled row of shared memory holds."""

BLOCK_Q = 64
"""Rows of a warpgroup: those of the tensor cores' products."""

WARPGROUPS = 2
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
      block_kv: keys of a block.
      num_stages: blocks of keys, and of values, that shared memory holds at once.
      num_buffers: tiles whose queries it holds: 2, or 1 where each block of threads has one tile.
      num_blocks: blocks of threads, which share out the tiles: one for each multiprocessor.
    """

    block_kv: int = 128
    num_stages: int = 2
    num_buffers: int = 2
    num_blocks: int = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What the kernel knows while it is traced.

    Attributes:
      tiles: its blocks.
      scale: factor on the scores, above 0.
      softcap: of the scores.
      has_low: some row does not see all keys before it.
      has_sinks: some row sees sinks beside its other keys.
      interpret: what ``plgpu.kernel`` takes to run it without a GPU.
    """

    tiles: Tiles
    scale: float
    softcap: float | None
    has_low: bool
    has_sinks: bool
    interpret: Any = False

    def blocks_of(self, shape: "Shape") -> int:
        """Blocks of threads: as many as run at once, or one a tile."""
        if self.tiles.num_buffers == 1:
            return shape.num_tiles
        return min(self.tiles.num_blocks, shape.num_tiles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How work is cut into tiles."""

    num_batch: int
    num_rows: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, q_shape: tuple[int, ...], *, num_kv_heads: int) -> "Shape":
        """Of queries [B, T, N, H]; T is filled up to whole tiles."""
        num_batch, num_rows, num_heads, _ = q_shape
        return cls(
            num_batch=num_batch,
            num_rows=num_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )

    @property
    def heads_of_tile(self) -> int:
        """Two heads of a group where it is even, which then share all loads."""
        return 2 if (self.num_heads // self.num_kv_heads) % 2 == 0 else 1

    @property
    def rows_of_tile(self) -> int:
        """Rows of one head."""
        return WARPGROUPS * BLOCK_Q // self.heads_of_tile

    @property
    def parts(self) -> int:
        """Tiles of the same rows and KV head."""
        return self.num_heads // self.num_kv_heads // self.heads_of_tile

    @property
    def row_blocks(self) -> int:
        """Tiles along the rows."""
        return -(-self.num_rows // self.rows_of_tile)

    @property
    def num_tiles(self) -> int:
        """All of them."""
        return self.num_batch * self.num_kv_heads * self.row_blocks * self.parts

    def tile(self, number: Any, *, has_low: bool) -> tuple[Any, Any, Any, Any]:
        """Batch row, KV head, block of rows and first head of a tile.

        The last rows come first, since they may see the most keys. Where all rows see all keys
        before them, a head's follow one another, so that its keys stay in the chip's memory. Else
        all heads of the same rows do: the few rows that see far more than others, full ones, then
        fall on all blocks of threads alike.
        """
        number, part = number // self.parts, number % self.parts
        if has_low:
            number, kv_head = number // self.num_kv_heads, number % self.num_kv_heads
            row, block = number // self.row_blocks, number % self.row_blocks
        else:
            number, block = number // self.row_blocks, number % self.row_blocks
            row, kv_head = number // self.num_kv_heads, number % self.num_kv_heads
        group = self.num_heads // self.num_kv_heads
        head = kv_head * group + part * self.heads_of_tile
        return row, kv_head, self.row_blocks - 1 - block, head


def step_table(blocks: BlockMap) -> Int[Array, "B Q 8"]:
    """What a tile reads of the block map: see :class:`Steps`.

    One without visible keys visits block 0, all of it hidden: both warpgroups take their turns in
    every tile, or one would wait for the other.
    """
    num_sinks = blocks.sink_end - blocks.sink_first
    left = num_sinks + blocks.unmasked_first - blocks.first
    masked = left + blocks.end - blocks.unmasked_end
    total = masked + blocks.unmasked_end - blocks.unmasked_first
    masked, total = jnp.where(total == 0, 1, masked), jnp.maximum(total, 1)
    columns = (
        num_sinks,
        left,
        masked,
        total,
        blocks.sink_first,
        blocks.first - num_sinks,
        blocks.unmasked_end - left,
        blocks.unmasked_first - masked,
    )
    return jnp.stack(columns, axis=2).astype(jnp.int32)


def choose_tiles(head_dim: int) -> Tiles:
    """What fits shared memory, 227 KiB.

    With heads of 128, blocks of threads that stay for many tiles are the faster ones.
    """
    if head_dim <= 64:
        return Tiles(num_stages=4, num_buffers=1)
    return Tiles() if head_dim <= 128 else Tiles(block_kv=64, num_buffers=1)


class Steps:
    """The blocks of keys that a tile visits.

    Steps end at `sinks`, `left`, `masked` and `total`; with each kind goes what its steps' numbers
    lack of their blocks'.
    """

    def __init__(self, table_ref: Any, row: Any, block: Any):
        columns = [table_ref[row, block, column] for column in range(8)]
        self.sinks, self.left, self.masked, self.total = columns[:4]
        self._shifts = columns[4:]

    def block(self, step: Any) -> Any:
        """Which block of keys a step is for."""
        sinks, left, right, whole = self._shifts
        shift = jnp.where(step < self.masked, right, whole)
        shift = jnp.where(step < self.left, left, shift)
        return step + jnp.where(step < self.sinks, sinks, shift)


@functools.partial(jax.jit, static_argnums=0)  # so a model's layers are traced and lowered once
def attend(
    static: Static,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bounds: Int[Array, "B 4 T"],
    table: Int[Array, "B Q 8"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of each row.

    Args:
      static: of the kernel.
      q, k, v: T is a multiple of a tile's rows, S of a block's keys, H of 64. What a row's bounds
        leave out may hold anything in k but not in v: a weight of 0 times NaN is NaN.
      bounds: each row sees the keys ``bounds[0] .. bounds[1]`` and ``bounds[2] .. bounds[3] - 1``;
        none where ``bounds[1]`` is below 0.
      table: :func:`step_table` of the rows' block map.

    Returns:
      The output, and the log-sum-exp; zeros and -inf for rows that see no key.
    """
    num_batch, num_rows, num_heads, head_dim = q.shape
    shape, tiles = Shape.of(q.shape, num_kv_heads=k.shape[2]), static.tiles
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def memory(*lead: int, rows: int) -> Any:
        return plgpu.SMEM((*lead, rows, head_dim), q.dtype, transforms=transforms)

    def entry(*refs: Any) -> None:
        slots = tiles.num_stages
        pl.run_scoped(
            functools.partial(_kernel, *refs, static=static, shape=shape, dtype=q.dtype),
            (
                memory(tiles.num_buffers, WARPGROUPS, rows=BLOCK_Q),
                memory(slots, rows=tiles.block_kv),
                memory(slots, rows=tiles.block_kv),
                plgpu.SMEM((WARPGROUPS, BLOCK_Q), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=tiles.num_buffers * WARPGROUPS),
                plgpu.Barrier(num_barriers=slots),
                plgpu.Barrier(num_barriers=slots),
            ),
            (
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.num_buffers),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            collective_axes="thread",
        )

    compiled = plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_batch, num_heads, num_rows), jnp.float32),
        ),
        grid=(static.blocks_of(shape),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret,
    )
    out, lse = compiled(q, k, v, bounds, table)
    return out, lse


def load(ref: Any, *, layout: Any) -> Any:
    """What memory holds, in registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def _kernel(
    # in, in device memory
    q_ref: Any,  # [B, T, N, H]
    k_ref: Any,  # [B, S, K, H]
    v_ref: Any,
    bounds_ref: Any,  # [B, 4, T]
    table_ref: Any,  # [B, Q, 8]
    # out
    out_ref: Any,  # [B, T, N, H]
    lse_ref: Any,  # [B, N, T]
    # in shared memory
    memory: tuple[Any, ...],  # q and out [buffers, 2, 64, H], k, v [slots, S, H], lse [2, 64]
    filled: tuple[Any, ...],  # barriers of q, k and v: a slot holds what was loaded
    freed: tuple[Any, ...],  # and: it may be overwritten
    turn: Any,
    *,
    static: Static,
    shape: Shape,
    dtype: Any,
) -> None:
    thread = lax.axis_index("thread")
    block = lax.axis_index("block")
    blocks = static.blocks_of(shape)
    num_tiles = (shape.num_tiles - block + blocks - 1) // blocks
    qo, k, v, lse = memory
    slots, buffers = static.tiles.num_stages, static.tiles.num_buffers
    block_kv = static.tiles.block_kv

    def place(number: Any, warpgroup: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Where a warpgroup's rows are: batch row, KV head, block of rows, first row, head."""
        row, kv_head, rows, head = shape.tile(block + number * blocks, has_low=static.has_low)
        first = rows * shape.rows_of_tile
        if shape.heads_of_tile == 2:
            return row, kv_head, rows, first, head + warpgroup
        return row, kv_head, rows, first + warpgroup * BLOCK_Q, head

    @pl.when(thread == WARPGROUPS)
    def _load_keys() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def tile(number: Any, before: Any) -> Any:
            buffer = number % buffers
            plgpu.barrier_wait(freed[0].at[buffer])
            for warpgroup in range(WARPGROUPS):
                row, kv_head, rows, first, head = place(number, warpgroup)
                plgpu.copy_gmem_to_smem(
                    q_ref.at[row, pl.ds(first, BLOCK_Q), head],
                    qo.at[buffer, warpgroup],
                    filled[0].at[buffer * WARPGROUPS + warpgroup],
                )
            row, kv_head, rows, _, _ = place(number, 0)
            steps = Steps(table_ref, row, rows)

            @pl.loop(0, steps.total)
            def _step(step: Any) -> None:
                slot = (before + step) % slots
                keys = pl.ds(steps.block(step) * block_kv, block_kv)
                for x_ref, x, free, full in (
                    (k_ref, k, freed[1], filled[1]),
                    (v_ref, v, freed[2], filled[2]),
                ):
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.copy_gmem_to_smem(x_ref.at[row, keys, kv_head], x.at[slot], full.at[slot])

            return before + steps.total

        lax.fori_loop(0, num_tiles, tile, jnp.int32(0))
        # No barrier ends with a phase that nobody has waited for.
        for barrier, count in zip(freed, (buffers, slots, slots), strict=True):
            for slot in range(count):
                plgpu.barrier_wait(barrier.at[slot])

    @pl.when(thread < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        # All is free at first.
        for barrier, count in zip(freed, (buffers, slots, slots), strict=True):
            for slot in range(count):
                plgpu.barrier_arrive(barrier.at[slot])

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        pl.when(thread == 1)(take_turns)

        def tile(number: Any, before: Any) -> Any:
            buffer = number % buffers
            row, _, rows, first, head = place(number, thread)
            steps = Steps(table_ref, row, rows)
            q_TH = qo.at[buffer, thread]
            by_row, products = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
            low, high, sinks, sinks_end = (
                load(bounds_ref.at[row, bound, pl.ds(first, BLOCK_Q)], layout=by_row)
                for bound in range(4)
            )
            plgpu.barrier_wait(filled[0].at[buffer * WARPGROUPS + thread])
            plgpu.barrier_wait(filled[1].at[before % slots])

            def add_block(step: Any, sums: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
                largest, total, out = sums
                slot = (before + step) % slots

                def multiply_keys(scores_ref: Any) -> Any:
                    plgpu.wgmma(scores_ref, q_TH, k.at[slot].transpose((1, 0)))
                    take_turns()
                    return scores_ref[...]

                scores = pl.run_scoped(multiply_keys, plgpu.ACC((BLOCK_Q, block_kv), jnp.float32))
                plgpu.barrier_arrive(freed[1].at[slot])
                factor = static.scale * LOG2_E
                if static.softcap is not None:
                    capped = jnp.tanh(scores * (static.scale / static.softcap))
                    scores, factor = capped * static.softcap, LOG2_E

                def spread(x: Any) -> Any:
                    return lax.broadcast_in_dim(x, (BLOCK_Q, block_kv), [0])

                if masked:
                    keys = plgpu.broadcasted_iota(
                        jnp.int32, (BLOCK_Q, block_kv), 1, layout=products
                    )
                    keys = keys + steps.block(step) * block_kv
                    seen = keys <= spread(high)
                    if static.has_low:
                        seen = seen & (keys >= spread(low))
                    if static.has_sinks:
                        seen = seen | ((keys >= spread(sinks)) & (keys < spread(sinks_end)))
                    scores = jnp.where(seen, scores, -jnp.inf)
                # In units of log2, so that a weight takes one multiply-add and one exp2.
                new_largest = jnp.maximum(largest, scores.max(axis=1) * factor)
                shrunk = jnp.exp2(largest - new_largest)
                weights = jnp.exp2(scores * factor - spread(new_largest))
                out = out * lax.broadcast_in_dim(shrunk, out.shape, [0])
                total = total * shrunk
                weights_low = weights.astype(dtype)

                def end_turn() -> None:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(filled[2].at[slot])
                    plgpu.barrier_wait(turn)

                if out.shape[1] <= 128:
                    total = total + weights.sum(axis=1)
                    out, total, new_largest, weights_low = lax.optimization_barrier(
                        (out, total, new_largest, weights_low)
                    )
                    end_turn()
                else:
                    end_turn()
                    total = total + weights.sum(axis=1)

                def wait_for_next_keys() -> None:
                    @pl.when(step + 1 < steps.total)
                    def _next_keys() -> None:
                        plgpu.barrier_wait(filled[1].at[(before + step + 1) % slots])

                def multiply_values(out_ref: Any) -> None:
                    plgpu.wgmma(out_ref, weights_low, v.at[slot])
                    wait_for_next_keys()

                if static.interpret:  # knows no products onto what is there
                    out = out + jnp.dot(
                        weights_low, v.at[slot][...], preferred_element_type=jnp.float32
                    )
                    plgpu.commit_smem()  # this read is not the tensor cores'
                    wait_for_next_keys()
                else:
                    out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
                plgpu.barrier_arrive(freed[2].at[slot])
                return new_largest, total, out

            sums = (
                plgpu.layout_cast(jnp.full((BLOCK_Q,), LOWEST, jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((BLOCK_Q, q_ref.shape[3]), jnp.float32), products),
            )
            sums = lax.fori_loop(0, steps.masked, functools.partial(add_block, masked=True), sums)

            largest, total, out = lax.fori_loop(
                steps.masked, steps.total, functools.partial(add_block, masked=False), sums
            )
            # Whole blocks are whole for the rows that see any key.
            total = jnp.where(high >= 0, total, 0.0)
            some = jnp.where(total > 0, total, 1.0)
            out = out * lax.broadcast_in_dim(1 / some, out.shape, [0])
            seen = lax.broadcast_in_dim(total, out.shape, [0]) > 0
            q_TH[...] = jnp.where(seen, out, 0.0).astype(dtype)
            lse.at[thread][...] = jnp.where(total > 0, largest / LOG2_E + jnp.log(some), -jnp.inf)
            plgpu.commit_smem()
            there = pl.ds(first, BLOCK_Q)
            plgpu.copy_smem_to_gmem(q_TH, out_ref.at[row, there, head])
            plgpu.copy_smem_to_gmem(lse.at[thread], lse_ref.at[row, head, there])
            # Now, not within the next tile: the other warpgroup may wait there for its turn, which
            # comes with queries that would wait for this memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(freed[0].at[buffer])
            return before + steps.total

        lax.fori_loop(0, num_tiles, tile, jnp.int32(0))
        pl.when(thread == 0)(take_turns)
        plgpu.wait_smem_to_gmem(0)
