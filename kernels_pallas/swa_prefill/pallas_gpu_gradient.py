"""The gradient of ``pallas_gpu``: a kernel for dq, and one for dk and dv.

With p the weights, as the log-sum-exp gives them anew, and delta = rowsum(d_out * out) - d_lse::

    ds = p * (d_out v^T - delta)        dq = ds k        dk = ds^T q        dv = p^T d_out

dq walks as the forward kernel does: a tile's rows, and the blocks of keys that they see. dk and dv
are by keys: 64 of them for each of two warpgroups, and all rows of the group's heads that see them,
64 at a time, so that sums over heads and rows stay in registers. Scores are transposed there,
[keys, rows], which makes the weights the left operand of both products::

    rows    . . | sees the block whole . . | . . . | full rows, or other segments' sinks
            [ masked ][     whole          ][masked]      [ masked ]

Nothing is added in device memory, so a gradient is the same each time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end
from kernels_pallas.mask import IntOrPerRow, RowInfo, per_row
from kernels_pallas.swa_prefill.pallas_gpu_kernels import (
    BLOCK_Q,
    LOG2_E,
    WARPGROUPS,
    Shape,
    Static,
    Steps,
    Tiles,
    load,
    plgpu,
)

__all__ = [
    "ABOVE_ALL_SCORES",
    "KEYS_OF_TILE",
    "MOST_HEAD_DIM",
    "choose_tiles",
    "key_table",
    "keys_gradient",
    "queries_gradient",
]

MOST_HEAD_DIM = 128
"""Sums of dk and dv of wider heads do not fit the registers."""

ABOVE_ALL_SCORES = 1e30
"""The log-sum-exp of rows that see nothing: their weights are 0."""

KEYS_OF_TILE = WARPGROUPS * BLOCK_Q
"""Keys of a tile of dk and dv."""

_FAR = jnp.iinfo(jnp.int32).max


def choose_tiles() -> Tiles:
    """Keys of a step of dq, and how many steps of either kernel are loaded at once."""
    return Tiles(block_kv=64, num_stages=4, num_buffers=1)


def key_table(
    rows: RowInfo,
    *,
    window: IntOrPerRow | None,
    num_sink_tokens: IntOrPerRow,
    num_keys: int,
    num_rows: int,
) -> tuple[Int[Array, "B J 8"], Int[Array, "B Q"]]:
    """Which blocks of 64 rows a tile of keys is read by, and the blocks that have full rows.

    Blocks are numbered along the rows. As in ``pallas_gpu_kernels.step_table`` a line has the ends
    of its kinds of steps and what a step's number lacks of its block's; the last kind, full rows
    beyond the others, are places in the second array instead. `num_rows` are those of whole tiles.
    """
    num_batch, given = rows.q_index.shape
    num_blocks = num_rows // BLOCK_Q
    low_BT, start_BT = rows.q_start, rows.q_start
    if window is not None:
        low_BT = jnp.maximum(rows.q_index - per_row(window)[:, None] + 1, rows.q_start)

    def blocks(x_BT: Array, reduce: Any, fill: int) -> Array:
        x_BT = jnp.where(rows.q_valid, x_BT, fill)
        x_BT = pad_end(x_BT, num_rows - given, axis=1, value=fill)
        return reduce(x_BT.reshape(num_batch, num_blocks, BLOCK_Q), axis=2)

    first, last = blocks(rows.q_index, jnp.min, _FAR), blocks(rows.q_index, jnp.max, -1)
    # Blocks without valid rows are the last ones, and seen by no key.
    last = jnp.where(last < 0, _FAR, last)
    least_low, most_low = blocks(low_BT, jnp.min, _FAR), blocks(low_BT, jnp.max, _FAR)
    least_start, most_start = blocks(start_BT, jnp.min, _FAR), blocks(start_BT, jnp.max, _FAR)
    num_tiles = -(-num_keys // KEYS_OF_TILE)
    begin = jnp.arange(num_tiles, dtype=jnp.int32) * KEYS_OF_TILE
    end = begin + KEYS_OF_TILE - 1

    def count(x_BQ: Array, key_J: Array, side: str) -> Array:
        """Entries below a key (or at it: "right"), of arrays that do not fall."""
        find = functools.partial(jnp.searchsorted, side=side)
        return jax.vmap(lambda x: find(x, key_J))(x_BQ).astype(jnp.int32)

    some = count(first, jnp.full((1,), _FAR, jnp.int32), "left")  # blocks with valid rows
    seen_from = jnp.minimum(count(last, begin, "left"), some)
    seen_to = jnp.clip(count(least_low, end, "right"), seen_from, some)
    segment_to = jnp.clip(count(least_start, end, "right"), seen_to, some)
    if window is not None:
        sinks_B1 = per_row(num_sink_tokens)[:, None]
        reach = jnp.where(most_start == _FAR, _FAR, most_start + sinks_B1)
        has_sinks = (count(reach, begin, "right") < segment_to) & (sinks_B1 > 0)
        seen_to = jnp.where(has_sinks, segment_to, seen_to)
    whole_from = jnp.clip(count(first, end, "left"), seen_from, seen_to)
    whole_to = jnp.clip(count(most_low, begin, "right"), whole_from, seen_to)
    listed = jnp.full((num_batch, num_blocks), _FAR, jnp.int32)
    full_from = full_to = jnp.zeros_like(seen_from)
    if window is not None and rows.q_full is not None:
        has_full = blocks(rows.q_full.astype(jnp.int32), jnp.max, 0) > 0
        numbers = jnp.arange(num_blocks, dtype=jnp.int32)
        listed = jnp.sort(jnp.where(has_full, numbers, _FAR), axis=1)
        place = jax.vmap(lambda x, at: jnp.searchsorted(x, at).astype(jnp.int32))
        full_from = place(listed, seen_to)
        full_to = jnp.maximum(place(listed, segment_to), full_from)
    left = whole_from - seen_from
    right = left + seen_to - whole_to
    masked = right + full_to - full_from
    total = masked + whole_to - whole_from
    columns = (
        left,
        right,
        masked,
        total,
        seen_from,
        whole_to - left,
        full_from - right,
        whole_from - masked,
    )
    return jnp.stack(columns, axis=2).astype(jnp.int32), listed


@functools.partial(jax.jit, static_argnums=0)
def queries_gradient(
    static: Static,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    bounds: Int[Array, "B 4 T"],
    table: Int[Array, "B Q 8"],
) -> Float[Array, "B T N H"]:
    """The gradient in q. Arguments are those of ``pallas_gpu_kernels.attend``, and lse in units of
    log2, far above all scores in rows that see nothing; d_out is 0 there.
    """
    shape, tiles, head_dim = Shape.of(q.shape, num_kv_heads=k.shape[2]), static.tiles, q.shape[3]
    memory = functools.partial(_memory, head_dim=head_dim, dtype=q.dtype)
    slots = tiles.num_stages

    def entry(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(_queries_kernel, *refs, static=static, shape=shape, dtype=q.dtype),
            (
                memory(WARPGROUPS, rows=BLOCK_Q),
                memory(WARPGROUPS, rows=BLOCK_Q),
                memory(slots, rows=tiles.block_kv),
                memory(slots, rows=tiles.block_kv),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
                plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
            collective_axes="thread",
        )

    return _kernel_of(
        entry,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        blocks=shape.num_tiles,
        static=static,
    )(q, k, v, d_out, lse, delta, bounds, table)


@functools.partial(jax.jit, static_argnums=0)
def keys_gradient(
    static: Static,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    bounds: Int[Array, "B 4 T"],
    table: Int[Array, "B J 8"],
    listed: Int[Array, "B Q"],
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Those in k and v. S is a multiple of `KEYS_OF_TILE`, the last two are :func:`key_table`'s; q
    and d_out are 0 in rows that see nothing.
    """
    head_dim, slots = q.shape[3], static.tiles.num_stages
    memory = functools.partial(_memory, head_dim=head_dim, dtype=q.dtype)
    numbers = plgpu.SMEM((slots, BLOCK_Q), jnp.float32)
    num_batch, num_keys, num_kv_heads, _ = k.shape

    def entry(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(_keys_kernel, *refs, static=static, dtype=q.dtype),
            (
                memory(WARPGROUPS, rows=BLOCK_Q),
                memory(WARPGROUPS, rows=BLOCK_Q),
                memory(slots, rows=BLOCK_Q),
                memory(slots, rows=BLOCK_Q),
                numbers,
                numbers,
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
                plgpu.Barrier(num_arrivals=4, num_barriers=slots),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
            collective_axes="thread",
        )

    one = jax.ShapeDtypeStruct(k.shape, k.dtype)
    blocks = num_batch * num_kv_heads * (num_keys // KEYS_OF_TILE)
    compiled = _kernel_of(entry, out_type=(one, one), blocks=blocks, static=static)
    d_k, d_v = compiled(q, k, v, d_out, lse, delta, bounds, table, listed)
    return d_k, d_v


def _memory(*lead: int, rows: int, head_dim: int, dtype: Any) -> Any:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*lead, rows, head_dim), dtype, transforms=transforms)


def _kernel_of(entry: Any, *, out_type: Any, blocks: int, static: Static) -> Any:
    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret,
    )


def _queries_kernel(
    # in, in device memory
    q_ref: Any,  # [B, T, N, H]
    k_ref: Any,  # [B, S, K, H]
    v_ref: Any,
    d_out_ref: Any,  # [B, T, N, H]
    lse_ref: Any,  # [B, N, T]
    delta_ref: Any,
    bounds_ref: Any,  # [B, 4, T]
    table_ref: Any,  # [B, Q, 8]
    # out
    dq_ref: Any,  # [B, T, N, H]
    # in shared memory
    memory: tuple[Any, ...],  # q and d_out [2, 64, H], k and v [slots, S, H]
    filled: tuple[Any, ...],  # barriers: of the first two, of the others
    freed: Any,
    *,
    static: Static,
    shape: Shape,
    dtype: Any,
) -> None:
    thread = lax.axis_index("thread")
    q, d_out, k, v = memory
    slots, block_kv = static.tiles.num_stages, static.tiles.block_kv
    row, kv_head, tile_rows, head = shape.tile(lax.axis_index("block"))
    first = tile_rows * shape.rows_of_tile
    is_pair = shape.heads_of_tile == 2
    steps = Steps(table_ref, row, tile_rows)

    def place(warpgroup: Any) -> tuple[Any, Any]:
        """A warpgroup's first row, and head."""
        return (first, head + warpgroup) if is_pair else (first + warpgroup * BLOCK_Q, head)

    @pl.when(thread == WARPGROUPS)
    def _load_keys() -> None:
        plgpu.set_max_registers(40, action="decrease")
        for warpgroup in range(WARPGROUPS):
            begin, one_head = place(warpgroup)
            for x_ref, x in ((q_ref, q), (d_out_ref, d_out)):
                plgpu.copy_gmem_to_smem(
                    x_ref.at[row, pl.ds(begin, BLOCK_Q), one_head],
                    x.at[warpgroup],
                    filled[0].at[warpgroup],
                )

        @pl.loop(0, steps.total)
        def _step(step: Any) -> None:
            slot = step % slots
            keys = pl.ds(steps.block(step) * block_kv, block_kv)
            plgpu.barrier_wait(freed.at[slot])
            for x_ref, x in ((k_ref, k), (v_ref, v)):
                plgpu.copy_gmem_to_smem(
                    x_ref.at[row, keys, kv_head], x.at[slot], filled[1].at[slot]
                )

        for slot in range(slots):
            plgpu.barrier_wait(freed.at[slot])

    @pl.when(thread < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        for slot in range(slots):
            plgpu.barrier_arrive(freed.at[slot])
        by_row, products = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
        begin, one_head = place(thread)
        there = pl.ds(begin, BLOCK_Q)
        bounds = [load(bounds_ref.at[row, n, there], layout=by_row) for n in range(4)]
        lse = load(lse_ref.at[row, one_head, there], layout=by_row)
        delta = load(delta_ref.at[row, one_head, there], layout=by_row)
        plgpu.barrier_wait(filled[0].at[thread])

        def spread(x: Any) -> Any:
            return lax.broadcast_in_dim(x, (BLOCK_Q, block_kv), [0])

        def add_block(step: Any, dq: Any, *, masked: bool) -> Any:
            slot = step % slots
            plgpu.barrier_wait(filled[1].at[slot])

            def multiply(scores_ref: Any, d_weights_ref: Any) -> tuple[Any, Any]:
                plgpu.wgmma(scores_ref, q.at[thread], k.at[slot].transpose((1, 0)))
                plgpu.wgmma(d_weights_ref, d_out.at[thread], v.at[slot].transpose((1, 0)))
                return scores_ref[...], d_weights_ref[...]

            accumulator = plgpu.ACC((BLOCK_Q, block_kv), jnp.float32)
            scores, d_weights = pl.run_scoped(multiply, accumulator, accumulator)
            weights, slope = _weights(scores, spread(lse), static)
            if masked:
                keys = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, block_kv), 1, layout=products)
                keys = keys + steps.block(step) * block_kv
                seen = _seen(keys, [spread(bound) for bound in bounds], static)
                weights = jnp.where(seen, weights, 0.0)
            ds = weights * (d_weights - spread(delta))
            ds = (ds if slope is None else ds * slope).astype(dtype)

            def multiply_keys(dq_ref: Any) -> None:
                plgpu.wgmma(dq_ref, ds, k.at[slot])

            dq = _add_product(dq, ds, k.at[slot], multiply_keys, static)
            plgpu.barrier_arrive(freed.at[slot])
            return dq

        dq = plgpu.layout_cast(jnp.zeros((BLOCK_Q, q_ref.shape[3]), jnp.float32), products)
        dq = lax.fori_loop(0, steps.masked, functools.partial(add_block, masked=True), dq)
        dq = lax.fori_loop(
            steps.masked, steps.total, functools.partial(add_block, masked=False), dq
        )
        q.at[thread][...] = (dq * static.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q.at[thread], dq_ref.at[row, there, one_head])
        plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
    # in, in device memory
    q_ref: Any,  # [B, T, N, H]
    k_ref: Any,  # [B, S, K, H]
    v_ref: Any,
    d_out_ref: Any,  # [B, T, N, H]
    lse_ref: Any,  # [B, N, T]
    delta_ref: Any,
    bounds_ref: Any,  # [B, 4, T]
    table_ref: Any,  # [B, J, 8]
    listed_ref: Any,  # [B, Q]
    # out
    dk_ref: Any,  # [B, S, K, H]
    dv_ref: Any,
    # in shared memory
    memory: tuple[
        Any, ...
    ],  # k and v [2, 64, H], q and d_out [slots, 64, H], lse, delta [slots, 64]
    filled: tuple[Any, ...],  # barriers: of the first two, of the others
    freed: Any,
    *,
    static: Static,
    dtype: Any,
) -> None:
    thread = lax.axis_index("thread")
    k, v, q, d_out, lse, delta = memory
    slots, num_kv_heads = static.tiles.num_stages, k_ref.shape[2]
    num_groups = q_ref.shape[2] // num_kv_heads
    number, kv_head = (
        lax.axis_index("block") // num_kv_heads,
        lax.axis_index("block") % num_kv_heads,
    )
    num_tiles = k_ref.shape[1] // KEYS_OF_TILE
    row, tile = number // num_tiles, number % num_tiles  # the first keys have the most rows
    steps = Steps(table_ref, row, tile)

    def rows_of(step: Any) -> tuple[Any, Any]:
        """Head and first row of a step: masked ones of all heads come first, then the others."""
        is_masked = step < num_groups * steps.masked
        whole = steps.total - steps.masked
        rest = step - num_groups * steps.masked
        head = jnp.where(
            is_masked, step // jnp.maximum(steps.masked, 1), rest // jnp.maximum(whole, 1)
        )
        at = jnp.where(is_masked, step - head * steps.masked, steps.masked + rest - head * whole)
        block = steps.block(at)
        is_listed = (at >= steps.left) & (at < steps.masked)
        found = listed_ref[row, jnp.where(is_listed, block, 0)]
        return kv_head * num_groups + head, jnp.where(is_listed, found, block) * BLOCK_Q

    @pl.when(thread == WARPGROUPS)
    def _load_rows() -> None:
        plgpu.set_max_registers(40, action="decrease")
        for warpgroup in range(WARPGROUPS):
            keys = pl.ds(tile * KEYS_OF_TILE + warpgroup * BLOCK_Q, BLOCK_Q)
            for x_ref, x in ((k_ref, k), (v_ref, v)):
                plgpu.copy_gmem_to_smem(
                    x_ref.at[row, keys, kv_head], x.at[warpgroup], filled[0].at[warpgroup]
                )

        @pl.loop(0, num_groups * steps.total)
        def _step(step: Any) -> None:
            slot = step % slots
            head, begin = rows_of(step)
            there = pl.ds(begin, BLOCK_Q)
            plgpu.barrier_wait(freed.at[slot])
            for x_ref, x in ((q_ref, q), (d_out_ref, d_out)):
                plgpu.copy_gmem_to_smem(x_ref.at[row, there, head], x.at[slot], filled[1].at[slot])
            for x_ref, x in ((lse_ref, lse), (delta_ref, delta)):
                plgpu.copy_gmem_to_smem(x_ref.at[row, head, there], x.at[slot], filled[1].at[slot])

        for slot in range(slots):
            plgpu.barrier_wait(freed.at[slot])

    @pl.when(thread < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        for slot in range(slots):
            plgpu.barrier_arrive(freed.at[slot])
        by_column, products = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA
        plgpu.barrier_wait(filled[0].at[thread])
        square = (BLOCK_Q, BLOCK_Q)

        def spread(x: Any) -> Any:
            return lax.broadcast_in_dim(x, square, [1])

        def add_rows(step: Any, sums: tuple[Any, Any], *, masked: bool) -> tuple[Any, Any]:
            dk, dv = sums
            slot = step % slots
            plgpu.barrier_wait(filled[1].at[slot])

            def multiply(scores_ref: Any, d_weights_ref: Any) -> tuple[Any, Any]:
                plgpu.wgmma(scores_ref, k.at[thread], q.at[slot].transpose((1, 0)))
                plgpu.wgmma(d_weights_ref, v.at[thread], d_out.at[slot].transpose((1, 0)))
                return scores_ref[...], d_weights_ref[...]

            accumulator = plgpu.ACC(square, jnp.float32)
            scores, d_weights = pl.run_scoped(multiply, accumulator, accumulator)
            weights, slope = _weights(scores, spread(load(lse.at[slot], layout=by_column)), static)
            if masked:
                _, begin = rows_of(step)
                there = pl.ds(begin, BLOCK_Q)
                bounds = [load(bounds_ref.at[row, n, there], layout=by_column) for n in range(4)]
                keys = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=products)
                keys = keys + tile * KEYS_OF_TILE + thread * BLOCK_Q
                seen = _seen(keys, [spread(bound) for bound in bounds], static)
                weights = jnp.where(seen, weights, 0.0)
            ds = weights * (d_weights - spread(load(delta.at[slot], layout=by_column)))
            ds = (ds if slope is None else ds * slope).astype(dtype)
            weights = weights.astype(dtype)

            def multiply_d_out(dv_ref: Any) -> None:
                plgpu.wgmma(dv_ref, weights, d_out.at[slot])

            def multiply_queries(dk_ref: Any) -> None:
                plgpu.wgmma(dk_ref, ds, q.at[slot])

            dv = _add_product(dv, weights, d_out.at[slot], multiply_d_out, static)
            dk = _add_product(dk, ds, q.at[slot], multiply_queries, static)
            plgpu.barrier_arrive(freed.at[slot])
            return dk, dv

        nothing = jnp.zeros((BLOCK_Q, k_ref.shape[3]), jnp.float32)
        sums = (plgpu.layout_cast(nothing, products), plgpu.layout_cast(nothing, products))
        masked, total = num_groups * steps.masked, num_groups * steps.total
        sums = lax.fori_loop(0, masked, functools.partial(add_rows, masked=True), sums)
        dk, dv = lax.fori_loop(masked, total, functools.partial(add_rows, masked=False), sums)
        k.at[thread][...] = (dk * static.scale).astype(dtype)
        v.at[thread][...] = dv.astype(dtype)
        plgpu.commit_smem()
        keys = pl.ds(tile * KEYS_OF_TILE + thread * BLOCK_Q, BLOCK_Q)
        plgpu.copy_smem_to_gmem(k.at[thread], dk_ref.at[row, keys, kv_head])
        plgpu.copy_smem_to_gmem(v.at[thread], dv_ref.at[row, keys, kv_head])
        plgpu.wait_smem_to_gmem(0)


def _weights(scores: Any, lse: Any, static: Static) -> tuple[Any, Any]:
    """The softmax weights, and the soft cap's slope at the scores, if there is one."""
    if static.softcap is None:
        return jnp.exp2(scores * (static.scale * LOG2_E) - lse), None
    capped = jnp.tanh(scores * (static.scale / static.softcap))
    return jnp.exp2(capped * (static.softcap * LOG2_E) - lse), 1 - capped * capped


def _seen(keys: Any, bounds: list[Any], static: Static) -> Any:
    """Which pairs are visible: see ``pallas_gpu_kernels.attend``."""
    low, high, sinks, sinks_end = bounds
    seen = keys <= high
    if static.has_low:
        seen = seen & (keys >= low)
    if static.has_sinks:
        seen = seen | ((keys >= sinks) & (keys < sinks_end))
    return seen


def _add_product(sums: Any, left: Any, right_ref: Any, multiply: Any, static: Static) -> Any:
    """``sums + left @ right_ref``, on the tensor cores."""
    if not static.interpret:
        return pl.run_state(multiply)(plgpu.ACC.init(sums))
    found = jnp.dot(left, right_ref[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # this read is not the tensor cores'
    return sums + found
