"""The kernels of ``pallas_gpu``, for Hopper's tensor cores and copy engine.

A unit is some blocks of 128 slots of one row and KV head, read by one warpgroup. Its blocks lie far
apart, so that all units have as much to do, however many slots a row holds::

    slots of a row    [ block 0 | block 1 | block 2 | block 3 | ... | new tokens ]
    unit                   0         1         2         0                1

Keys and values of a block come into buffers in turn, while those before them are computed::

    buffer     0    1    2    0    1    2           a buffer is loaded again as soon as it was read
    holds      k0   v0   k1   v1   k2   v2  ...
    compute   | q k0  softmax  p v0 | q k1  softmax  p v1 | ...

The product's 64 rows are the new tokens' query heads of the KV head, and mostly padding: computing
takes less time than loading all the same. Two or more units run on a multiprocessor at once.
Each writes its output and log-sum-exp, and a second kernel joins them.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import LOWEST, round_up
from kernels_pallas.mask import visible
from kernels_pallas.mosaic_gpu import plgpu
from kernels_pallas.swa_decode.arguments import NEVER

__all__ = ["BLOCK", "COLUMNS", "MAX_ROWS", "Static", "Tiles", "attend", "join"]

BLOCK = 128
"""Slots of a block: threads of a warpgroup, each of which looks at one slot's position."""

COLUMNS = 64
"""Entries of a head that are copied side by side: what a swizzled row of shared memory holds."""

MAX_ROWS = 64
"""Rows of the tensor cores' products."""

_BLOCKS_AT_ONCE = 16
"""Blocks whose positions are waited for together."""

_LANES = 128
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
      units: of each row and KV head.
      step_slots: slots of a product, all of a block or half of them.
      num_buffers: steps' keys or values that shared memory holds at once; two units and more fit
        a multiprocessor up to 112 KiB, with the queries' 16.
    """

    units: int
    step_slots: int = BLOCK
    num_buffers: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What the kernel knows while it is traced.

    Attributes:
      tiles: its units and buffers.
      num_new, num_groups: new tokens of a row, and query heads of a KV head.
      num_blocks: blocks of cached slots.
      page_slots: slots of a page; None: a row has its own slots.
      is_full: no row has a window.
      scale: factor on the scores, above 0.
      softcap: of the scores.
      interpret: what ``plgpu.kernel`` takes to run it without a GPU.
    """

    tiles: Tiles
    num_new: int
    num_groups: int
    num_blocks: int
    page_slots: int | None
    is_full: bool
    scale: float
    softcap: float | None
    interpret: Any = False

    @property
    def steps_of_block(self) -> int:
        """Products for each block."""
        return BLOCK // self.tiles.step_slots

    @property
    def piece(self) -> int:
        """Slots that are copied at a time: they lie in one page."""
        return math.gcd(self.tiles.step_slots, self.page_slots or self.tiles.step_slots)


@functools.partial(jax.jit, static_argnums=0)  # so a model's layers are traced and lowered once
def attend(
    static: Static,
    q: Float[Array, "B K R H"],
    rules: Int[Array, "B 3 64"],
    positions: Int[Array, "B S"],
    table: Int[Array, "B M"],
    cache: tuple[Array, Array],
    new: tuple[Array, ...],
) -> tuple[Float[Array, "B K U R L"], Float[Array, "B K U R"]]:
    """Each unit's output, and log2 of its sum of weights.

    Args:
      static: of the kernel.
      q: R is a multiple of 8, H of 64, filled up with zeros.
      rules: position, window and sinks of each row ``token * group + head``; -1: no row.
      positions: of all blocks' slots, those of the new tokens last; ``NEVER``: holds nothing.
      table: pages of each row.
      cache: keys and values, rows or pages. Their head dim need not be a multiple of 64, and what
        no row sees may hold anything.
      new: keys and values of the new tokens, or nothing if they are in the cache.

    Returns:
      The outputs, L the whole lanes that hold H; zeros and -inf for rows that see no key of a
      unit.
    """
    num_batch, num_kv_heads, num_rows, head_dim = q.shape
    tiles, parts = static.tiles, q.shape[3] // COLUMNS
    buffer = (tiles.num_buffers, parts, tiles.step_slots, COLUMNS)
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, COLUMNS)), swizzle)
    # One memory in three views. Copies of any slots, the last ones too, want rows of it; products
    # want it in tiles of 8 rows, which lie in it just so.
    loaded = plgpu.SMEM(buffer, q.dtype, transforms=(swizzle,))
    read = plgpu.SMEM(buffer, q.dtype, transforms=tiled)
    written = plgpu.SMEM((MAX_ROWS, head_dim), jnp.float32)

    def entry(*refs: Any) -> None:
        def body(memory: Any, *scratch: Any) -> None:
            memory = (memory[0], memory[0], memory[1]) if static.interpret else memory
            _attend_to_unit(*refs, memory, *scratch, static=static, has_new=bool(new))

        pl.run_scoped(
            body,
            (loaded, written) if static.interpret else plgpu.RefUnion(loaded, read, written),
            # Parts overlap: what follows a part's rows is padding of the product's.
            plgpu.SMEM(
                (parts * num_rows + MAX_ROWS - num_rows, COLUMNS), q.dtype, transforms=tiled
            ),
            plgpu.SMEM((MAX_ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=parts),
            plgpu.Barrier(
                num_arrivals=parts * (tiles.step_slots // static.piece),
                num_barriers=tiles.num_buffers,
            ),
        )

    compiled = plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct(
                (num_batch, num_kv_heads, tiles.units, num_rows, round_up(head_dim, _LANES)),
                jnp.float32,
            ),
            jax.ShapeDtypeStruct((num_batch, num_kv_heads, tiles.units, num_rows), jnp.float32),
        ),
        grid=(num_batch * tiles.units * num_kv_heads,),
        grid_names=("unit",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret,
    )
    out, lse = compiled(q, rules, positions, table, *cache, *new)
    return out, lse


def _attend_to_unit(
    # in, in device memory
    q_ref: Any,  # [B, K, R, H]
    rules_ref: Any,  # [B, 3, 64]
    positions_ref: Any,  # [B, S]
    table_ref: Any,  # [B, M]
    *refs: Any,
    # k, v [B, S, K, H] or [P, page, K, H]; new k, v [B, n, K, H] if there are any
    # out: [B, K, U, R, H], lse [B, K, U, R]
    # in shared memory: three views of the buffers; q [H / 64 * R + 64 - R, 64], lse [64]
    # barriers: q and each buffer hold what was loaded
    static: Static,
    has_new: bool,
) -> None:
    *inputs, out_ref, lse_ref, (loaded, read, written), q, lse, q_filled, filled = refs
    k_refs, v_refs = inputs[::2], inputs[1::2]
    tiles, units = static.tiles, static.tiles.units
    num_kv_heads, num_rows = q_ref.shape[1:3]
    step_slots, buffers, parts = tiles.step_slots, tiles.num_buffers, q_ref.shape[3] // COLUMNS
    # Heads of a row's blocks are beside each other in memory, and so in time.
    number = lax.axis_index("unit")
    head, number = number % num_kv_heads, number // num_kv_heads
    row, unit = number // units, number % units
    num_blocks = static.num_blocks + has_new
    own_steps = (num_blocks - unit + units - 1) // units * static.steps_of_block

    def first_slot(step: Any) -> Any:
        block = unit + step // static.steps_of_block * units
        return block * BLOCK + step % static.steps_of_block * step_slots

    def copy(x_refs: Any, step: Any, buffer: Any) -> None:
        """Loads a step's keys or values; slots past the last one come as zeros."""
        start, end = first_slot(step), static.num_blocks * BLOCK

        def pieces(x_ref: Any, place: Any) -> None:
            for first in range(0, step_slots, static.piece):
                outer, slot = place(first)
                rows = pl.ds(first, static.piece)

                @pl.loop(0, parts)  # not unrolled: the last part may reach past the head's end
                def _part(part: Any, outer=outer, slot=slot, rows=rows) -> None:
                    columns = pl.ds(part * COLUMNS, COLUMNS)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[outer, pl.ds(slot, static.piece), head, columns],
                        loaded.at[buffer, part, rows],
                        filled.at[buffer],
                    )

        def cached(first: int) -> tuple[Any, Any]:
            if static.page_slots is None:
                return row, start + first
            # A last block may have more slots than the table.
            column = jnp.minimum((start + first) // static.page_slots, table_ref.shape[1] - 1)
            return table_ref[row, column], (start + first) % static.page_slots

        if has_new:
            pl.when(start < end)(lambda: pieces(x_refs[0], cached))
            pl.when(start >= end)(
                lambda: pieces(x_refs[1], lambda first: (row, start - end + first))
            )
        else:
            pieces(x_refs[0], cached)

    def load(number: Any, first_step: Any, end_step: Any, *, is_value: int) -> None:
        """The buffers' ``number``th contents: a step's keys, or its values after them."""
        step = first_step + number // 2

        @pl.when(step < end_step)
        def _load() -> None:
            copy(v_refs if is_value else k_refs, step, number % buffers)

    def begin(first_step: Any, end_step: Any) -> None:
        for number in range(buffers):
            load(number, first_step, end_step, is_value=number % 2)

    # A unit that fits the buffers is loaded before anything is known of it.
    most_steps = -(-num_blocks // units) * static.steps_of_block
    is_short = 2 * most_steps <= buffers
    if is_short:
        begin(0, own_steps)
    for part in range(parts):
        plgpu.copy_gmem_to_smem(
            q_ref.at[row, head, :, pl.ds(part * COLUMNS, COLUMNS)],
            q.at[pl.ds(part * num_rows, num_rows)],
            q_filled,
        )
    first, last, count = _seen_slots(static, rules_ref, positions_ref, row, unit, num_blocks)
    if is_short:
        first_step, end_step = jnp.int32(0), own_steps
    else:
        first_step, end_step = first // step_slots, (last + step_slots) // step_slots
        begin(first_step, end_step)
    plgpu.barrier_wait(q_filled)
    by_row, by_slot = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def rule(number: int) -> Any:
        rows = plgpu.load(rules_ref.at[row, number], layout=by_row, optimized=False)
        return lax.broadcast_in_dim(rows, (MAX_ROWS, step_slots), [0])

    q_pos, window, sinks = (rule(number) for number in range(3))

    def add_step(step: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        largest, total, *outs = sums
        number = 2 * (step - first_step)
        k_buffer, v_buffer = number % buffers, (number + 1) % buffers
        k_pos = plgpu.load(
            positions_ref.at[row, pl.ds(first_slot(step), step_slots)],
            layout=by_slot,
            optimized=False,
        )
        seen = visible(
            q_pos,
            lax.broadcast_in_dim(k_pos, (MAX_ROWS, step_slots), [1]),
            window=None if static.is_full else window,
            num_sink_tokens=sinks,
        )
        plgpu.barrier_wait(filled.at[k_buffer])

        def multiply_keys(scores_ref: Any) -> Any:
            for part in range(parts):
                k = read.at[k_buffer, part]
                q_rows = q.at[pl.ds(part * num_rows, MAX_ROWS)]
                plgpu.wgmma(scores_ref, q_rows, k.transpose((1, 0)))
            return scores_ref[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((MAX_ROWS, step_slots), jnp.float32))
        load(number + buffers, first_step, end_step, is_value=buffers % 2)
        factor = static.scale * _LOG2_E
        if static.softcap is not None:
            scores = jnp.tanh(scores * (static.scale / static.softcap)) * static.softcap
            factor = _LOG2_E
        scores = jnp.where(seen, scores, -jnp.inf)
        # In units of log2, so that a weight takes one multiply-add and one exp2.
        new_largest = jnp.maximum(largest, scores.max(axis=1) * factor)
        shrunk = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_largest, scores.shape, [0]))
        total = total * shrunk + weights.sum(axis=1)
        weights_low = weights.astype(q_ref.dtype)
        outs = [out * lax.broadcast_in_dim(shrunk, out.shape, [0]) for out in outs]
        plgpu.barrier_wait(filled.at[v_buffer])
        has_hidden = (
            (count != last - first + 1)
            | (step * step_slots < first)
            | ((step + 1) * step_slots > last + 1)
        )

        @pl.when(has_hidden)
        def _hide_values() -> None:
            _zero_hidden(static, rules_ref, positions_ref, row, first_slot(step), read.at[v_buffer])

        if static.interpret:  # knows no products onto what is there
            outs = [
                out
                + jnp.dot(
                    weights_low, read.at[v_buffer, part][...], preferred_element_type=jnp.float32
                )
                for part, out in enumerate(outs)
            ]
            plgpu.commit_smem()  # this read is not the tensor cores'
        else:

            def multiply_values(out_refs: Any) -> None:
                for part, out_ref in enumerate(out_refs):
                    plgpu.wgmma(out_ref, weights_low, read.at[v_buffer, part])

            outs = pl.run_state(multiply_values)([plgpu.ACC.init(out) for out in outs])
        load(number + 1 + buffers, first_step, end_step, is_value=1 - buffers % 2)
        return (new_largest, total, *outs)

    def initial(value: float, *shape: int, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    products = plgpu.Layout.WGMMA
    largest, total, *outs = lax.fori_loop(
        first_step,
        end_step,
        add_step,
        (
            initial(LOWEST, MAX_ROWS, layout=by_row),
            initial(0, MAX_ROWS, layout=by_row),
            *(initial(0, MAX_ROWS, COLUMNS, layout=products) for _ in range(parts)),
        ),
    )
    some = jnp.where(total > 0, total, 1.0)
    for part, out in enumerate(outs):
        out = out * lax.broadcast_in_dim(1 / some, out.shape, [0])
        written.at[:, pl.ds(part * COLUMNS, COLUMNS)][...] = out
    lse[...] = jnp.where(total > 0, largest + jnp.log2(some), -jnp.inf)
    plgpu.commit_smem()
    rows = pl.ds(0, num_rows)
    plgpu.copy_smem_to_gmem(
        written.at[rows], out_ref.at[row, head, unit, :, pl.ds(0, parts * COLUMNS)]
    )
    plgpu.copy_smem_to_gmem(lse.at[rows], lse_ref.at[row, head, unit])
    plgpu.wait_smem_to_gmem(0)


def _is_seen(static: Static, rules_ref: Any, row: Any) -> Callable[[Any], Any]:
    """Tells which positions some new token sees."""
    tokens = [
        [rules_ref[row, rule, token * static.num_groups] for rule in range(3)]
        for token in range(static.num_new)
    ]

    def is_seen(k_pos: Any) -> Any:
        window_of = (lambda window: None) if static.is_full else (lambda window: window)
        seen = [
            visible(q_pos, k_pos, window=window_of(window), num_sink_tokens=sinks)
            for q_pos, window, sinks in tokens
        ]
        return functools.reduce(operator.or_, seen)

    return is_seen


def _seen_slots(
    static: Static, rules_ref: Any, positions_ref: Any, row: Any, unit: Any, num_blocks: int
) -> tuple[Any, Any, Any]:
    """The first and the last of a unit's slots that a new token sees, and how many there are.

    Slots are counted through the unit's own blocks.
    """
    units = static.tiles.units
    layout = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=layout)
    is_seen = _is_seen(static, rules_ref, row)
    own_blocks = (num_blocks - unit + units - 1) // units
    at_once = min(_BLOCKS_AT_ONCE, -(-num_blocks // units))

    def positions_of(number: Any) -> Any:
        number = jnp.minimum(number, own_blocks - 1)
        here = pl.ds((unit + number * units) * BLOCK, BLOCK)
        return plgpu.load(positions_ref.at[row, here], layout=layout, optimized=False)

    def add_blocks(turn: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
        numbers = [turn * at_once + ahead for ahead in range(at_once)]
        first, last, count = found
        for number, k_pos in zip(
            numbers, [positions_of(number) for number in numbers], strict=True
        ):
            slot = number * BLOCK + lane
            seen = is_seen(k_pos) & (slot < own_blocks * BLOCK)
            first = jnp.minimum(first, jnp.where(seen, slot, NEVER))
            last = jnp.maximum(last, jnp.where(seen, slot, -1))
            count += jnp.where(seen, 1, 0)
        return first, last, count

    nothing = tuple(
        plgpu.layout_cast(jnp.full((BLOCK,), value, jnp.int32), layout) for value in (NEVER, -1, 0)
    )
    turns = (own_blocks + at_once - 1) // at_once
    first, last, count = lax.fori_loop(0, turns, add_blocks, nothing)
    last = jnp.max(last)
    return jnp.minimum(jnp.min(first), last + 1), last, jnp.sum(count)


def _zero_hidden(
    static: Static, rules_ref: Any, positions_ref: Any, row: Any, first_slot: Any, v: Any
) -> None:
    """Zeros in place of values that no new token sees: a weight of 0 times NaN is NaN."""
    k_pos = plgpu.load(
        positions_ref.at[row, pl.ds(first_slot, static.tiles.step_slots)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
    )
    seen = _is_seen(static, rules_ref, row)(k_pos)
    for part in range(v.shape[0]):
        values = plgpu.load(v.at[part], layout=plgpu.Layout.WGMMA, optimized=False)
        v.at[part][...] = jnp.where(lax.broadcast_in_dim(seen, values.shape, [0]), values, 0)
    plgpu.commit_smem()


@functools.partial(jax.jit, static_argnums=(0, 1))
def join(
    static: Static,
    dtype: Any,
    parts: Float[Array, "B K U R L"],
    lse: Float[Array, "B K U R"],
) -> Float[Array, "B n N L"]:
    """One softmax over all units of each query, as :func:`attend` leaves them; zeros where none
    sees a key.
    """
    num_batch, num_kv_heads, units, _, head_dim = parts.shape
    num_new, groups = static.num_new, static.num_groups
    num_heads = num_kv_heads * groups

    def kernel(parts_ref: Any, lse_ref: Any, out_ref: Any) -> None:
        number = lax.axis_index("query")
        number, head = number // num_heads, number % num_heads
        row, token = number // num_new, number % num_new
        here = head // groups, token * groups + head % groups
        sums = [lse_ref[row, here[0], unit, here[1]] for unit in range(units)]
        outs = [parts_ref[row, here[0], unit, here[1]] for unit in range(units)]
        largest = functools.reduce(jnp.maximum, sums, jnp.float32(LOWEST))
        weights = [jnp.exp2(one - largest) for one in sums]
        total = functools.reduce(operator.add, weights)
        shares = [weight / jnp.where(total > 0, total, 1.0) for weight in weights]
        weighed = [share * out for share, out in zip(shares, outs, strict=True)]
        out_ref[row, token, head] = functools.reduce(operator.add, weighed).astype(dtype)

    compiled = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_batch, num_new, num_heads, head_dim), dtype),
        grid=(num_batch * num_new * num_heads,),
        grid_names=("query",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret,
    )
    return compiled(parts, lse)
