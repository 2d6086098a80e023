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

from kernels_pallas.mosaic_gpu import plgpu
from kernels_pallas.swa_prefill.pallas_gpu_kernels import (
    BLOCK_Q,
    LOG2_E,
    WARPGROUPS,
    Shape,
    Static,
    Steps,
    Tiles,
    load,
)
from kernels_pallas.swa_prefill.pallas_gpu_key_table import KEYS_OF_TILE, joined

__all__ = [
    "ABOVE_ALL_SCORES",
    "MOST_HEAD_DIM",
    "choose_tiles",
    "keys_gradient",
    "queries_gradient",
]

MOST_HEAD_DIM = 128
"""Sums of dk and dv of wider heads do not fit the registers."""

ABOVE_ALL_SCORES = 1e30
"""The log-sum-exp of rows that see nothing: their weights are 0."""


def choose_tiles() -> Tiles:
    """Keys of a step of dq, and how many steps of either kernel are loaded at once."""
    return Tiles(block_kv=64, num_stages=4, num_buffers=1)


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
    lines: Int[Array, "B L 11"],
    listed: Int[Array, "B Q"],
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Those in k and v. S is a multiple of `KEYS_OF_TILE`, the last two are those of
    ``pallas_gpu_key_table.key_table``; q and d_out are 0 in rows that see nothing.
    """
    head_dim, slots = q.shape[3], static.tiles.num_stages
    num_pieces = lines.shape[1] - k.shape[1] // KEYS_OF_TILE
    memory = functools.partial(_memory, head_dim=head_dim, dtype=q.dtype)
    numbers = plgpu.SMEM((slots, BLOCK_Q), jnp.float32)
    num_batch, _, num_kv_heads, _ = k.shape

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
                plgpu.SMEM((slots, 4, BLOCK_Q), jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
                plgpu.Barrier(num_arrivals=5, num_barriers=slots),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
            collective_axes="thread",
        )

    whole = jax.ShapeDtypeStruct(k.shape, k.dtype)
    further = (num_batch, max(num_pieces, 1) * KEYS_OF_TILE, *k.shape[2:])
    further = jax.ShapeDtypeStruct(further, k.dtype)
    compiled = _kernel_of(
        entry,
        out_type=(whole, whole, further, further),
        blocks=num_batch * num_kv_heads * lines.shape[1],
        static=static,
    )
    d_k, d_v, more_k, more_v = compiled(q, k, v, d_out, lse, delta, bounds, lines, listed)
    if num_pieces == 0:
        return d_k, d_v
    return joined(d_k, more_k, lines[:, :num_pieces]), joined(d_v, more_v, lines[:, :num_pieces])


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
    row, kv_head, tile_rows, head = shape.tile(lax.axis_index("block"), has_low=static.has_low)
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
    lines_ref: Any,  # [B, P + J, 11]
    listed_ref: Any,  # [B, Q]
    # out
    dk_ref: Any,  # [B, S, K, H]
    dv_ref: Any,
    more_dk_ref: Any,  # [B, P * 128, K, H]
    more_dv_ref: Any,
    # in shared memory: k and v [2, 64, H]; q and d_out [slots, 64, H]; lse, delta [slots, 64];
    # bounds [slots, 4, 64]
    memory: tuple[Any, ...],
    filled: tuple[Any, ...],  # barriers: of the first two, of the others
    freed: Any,
    *,
    static: Static,
    dtype: Any,
) -> None:
    thread = lax.axis_index("thread")
    k, v, q, d_out, lse, delta, bounds = memory
    slots, num_kv_heads = static.tiles.num_stages, k_ref.shape[2]
    num_groups = q_ref.shape[2] // num_kv_heads
    number, kv_head = (
        lax.axis_index("block") // num_kv_heads,
        lax.axis_index("block") % num_kv_heads,
    )
    num_lines = lines_ref.shape[1]
    num_pieces = num_lines - k_ref.shape[1] // KEYS_OF_TILE
    row, line = number // num_lines, number % num_lines  # further pieces, then the first keys
    steps = Steps(lines_ref, row, line)
    tile, begin, end = (lines_ref[row, line, column] for column in (8, 9, 10))
    masked = jnp.clip(steps.masked - begin, 0, end - begin)
    whole = end - begin - masked
    all_masked, all_steps = num_groups * masked, num_groups * (end - begin)

    def rows_of(step: Any) -> tuple[Any, Any]:
        """Head and first row of a step: masked ones of all heads come first, then the others."""
        is_masked, rest = step < all_masked, step - all_masked
        head = jnp.where(is_masked, step // jnp.maximum(masked, 1), rest // jnp.maximum(whole, 1))
        at = jnp.where(is_masked, step - head * masked, masked + rest - head * whole) + begin
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

        @pl.loop(0, all_steps)
        def _step(step: Any) -> None:
            slot = step % slots
            head, first = rows_of(step)
            there = pl.ds(first, BLOCK_Q)
            plgpu.barrier_wait(freed.at[slot])
            for x_ref, x in ((q_ref, q), (d_out_ref, d_out)):
                plgpu.copy_gmem_to_smem(x_ref.at[row, there, head], x.at[slot], filled[1].at[slot])
            for x_ref, x in ((lse_ref, lse), (delta_ref, delta)):
                plgpu.copy_gmem_to_smem(x_ref.at[row, head, there], x.at[slot], filled[1].at[slot])
            plgpu.copy_gmem_to_smem(
                bounds_ref.at[row, :, there], bounds.at[slot], filled[1].at[slot]
            )

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
            slot = step % slots
            plgpu.barrier_wait(filled[1].at[slot])
            q_TH, d_out_TH = q.at[slot], d_out.at[slot]

            def weigh(scores: Any) -> tuple[Any, Any]:
                lse_T = load(lse.at[slot], layout=by_column)
                weights, slope = _weights(scores, spread(lse_T), static)
                if masked:
                    ranges = [load(bounds.at[slot, n], layout=by_column) for n in range(4)]
                    keys = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=products)
                    keys = keys + tile * KEYS_OF_TILE + thread * BLOCK_Q
                    seen = _seen(keys, [spread(x) for x in ranges], static)
                    weights = jnp.where(seen, weights, 0.0)
                return weights, slope

            def change(weights: Any, slope: Any, d_weights: Any) -> Any:
                ds = weights * (d_weights - spread(load(delta.at[slot], layout=by_column)))
                return (ds if slope is None else ds * slope).astype(dtype)

            def multiply(refs: Any) -> None:
                # Each product begins before the one before it is waited for:
                #     tensor cores    scores | d_weights | dv | dk
                #     the rest               | weights   | ds |
                dk_ref, dv_ref, scores_ref, d_weights_ref = refs
                plgpu.wgmma(scores_ref, k.at[thread], q_TH.transpose((1, 0)))
                plgpu.wgmma(d_weights_ref, v.at[thread], d_out_TH.transpose((1, 0)))
                weights, slope = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
                plgpu.wgmma(dv_ref, weights.astype(dtype), d_out_TH)
                d_weights = plgpu.wgmma_accumulator_load(d_weights_ref, wait_n=1)
                plgpu.wgmma(dk_ref, change(weights, slope, d_weights), q_TH)

            def multiply_apart(scores_ref: Any, d_weights_ref: Any) -> tuple[Any, Any]:
                plgpu.wgmma(scores_ref, k.at[thread], q_TH.transpose((1, 0)))
                plgpu.wgmma(d_weights_ref, v.at[thread], d_out_TH.transpose((1, 0)))
                return scores_ref[...], d_weights_ref[...]

            if static.interpret:
                accumulator = plgpu.ACC(square, jnp.float32)
                scores, d_weights = pl.run_scoped(multiply_apart, accumulator, accumulator)
                weights, slope = weigh(scores)
                ds = change(weights, slope, d_weights)
                dk, dv = sums
                dv = dv + _dot(weights.astype(dtype), d_out_TH)
                dk = dk + _dot(ds, q_TH)
            else:
                nothing = plgpu.layout_cast(jnp.zeros(square, jnp.float32), products)
                refs = tuple(plgpu.ACC.init(x) for x in (*sums, nothing, nothing))
                dk, dv, _, _ = pl.run_state(multiply)(refs)
            plgpu.barrier_arrive(freed.at[slot])
            return dk, dv

        nothing = jnp.zeros((BLOCK_Q, k_ref.shape[3]), jnp.float32)
        sums = (plgpu.layout_cast(nothing, products), plgpu.layout_cast(nothing, products))
        sums = lax.fori_loop(0, all_masked, functools.partial(add_rows, masked=True), sums)
        dk, dv = lax.fori_loop(
            all_masked, all_steps, functools.partial(add_rows, masked=False), sums
        )
        k.at[thread][...] = (dk * static.scale).astype(dtype)
        v.at[thread][...] = dv.astype(dtype)
        plgpu.commit_smem()

        def write(first: Any, to_dk_ref: Any, to_dv_ref: Any) -> None:
            keys = pl.ds(first + thread * BLOCK_Q, BLOCK_Q)
            plgpu.copy_smem_to_gmem(k.at[thread], to_dk_ref.at[row, keys, kv_head])
            plgpu.copy_smem_to_gmem(v.at[thread], to_dv_ref.at[row, keys, kv_head])

        is_further = line < num_pieces
        pl.when(is_further)(lambda: write(line * KEYS_OF_TILE, more_dk_ref, more_dv_ref))
        pl.when(~is_further)(lambda: write(tile * KEYS_OF_TILE, dk_ref, dv_ref))
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
    if static.interpret:
        return sums + _dot(left, right_ref)
    return pl.run_state(multiply)(plgpu.ACC.init(sums))


def _dot(left: Any, right_ref: Any) -> Any:
    """The product for the interpreter, which knows none onto what is there."""
    found = jnp.dot(left, right_ref[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # this read is not the tensor cores'
    return found
