"""The TPU kernel of decoding: one program reads one block of one row's cache."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.mask import visible

_LOG2_E = math.log2(math.e)
# Below every score, and finite: exp2(-inf - _LOWEST) is 0 where exp2(-inf + inf) would be NaN.
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStatic:
    """What the kernel needs to know while tracing.

    Attributes:
      num_kv_heads: K.
      block_keys: keys of a block: ``slots * K``, or slots if they lie in lanes.
      slots_in_lanes: which of two layouts the cache has, see :func:`attend_to_blocks`.
      num_splits: X.
      is_full: the layer is full, whatever the rows' rules say.
      scale: factor on ``q.k``.
      softcap: None: no cap.
      interpret: run as plain JAX.
    """

    num_kv_heads: int
    block_keys: int
    slots_in_lanes: bool
    num_splits: int
    is_full: bool
    scale: float
    softcap: float | None
    interpret: Any


def attend_to_blocks(
    static: DecodeStatic,
    *,
    items: Int[Array, " items"],
    counts: Int[Array, " B"],
    page_table: Int[Array, "B pages"] | None,
    rules: Int[Array, "B R 4"],
    q: Float[Array, "B R W"],
    new_positions: Int[Array, "B 1 M"],
    new_k: Float[Array, "B _ _"],
    new_v: Float[Array, "B _ _"],
    positions: Int[Array, "B 1 P"],
    k: Float[Array, "rows _ _"],
    v: Float[Array, "rows _ _"],
) -> tuple[Float[Array, "X B R H"], Float[Array, "X B R 1"]]:
    """Attention of each row's R query rows to its needed blocks, one result a split.

    The grid is ``(splits, B, steps)``; a split takes the next part of a row's items, and the number
    of steps is traced: that of the row that needs most. Four items a row, two splits::

        row 0 needs 7 blocks      split 0: [0 1 2 3]   split 1: [4 5 6 .]      4 steps
        row 1 needs 2             split 0: [0 . . .]   split 1: [1 . . .]

    A step beyond a row's items asks for the block that is there already: nothing is loaded.

    Args:
      static: constants.
      items: ``2 * block + free``, see ``work_list``.
      counts: items of each row.
      page_table: the pages of each row where it shares k and v with the others, whose first axis
        is then that of pages; a page is whole blocks.
      rules: position, window, sinks and KV head of each query row.
      q: query rows ``[token, head]`` of width W, that of a key.
      new_positions: of the new tokens' keys, which split 0 sees first.
      new_k, new_v: their keys and values, in k's layout.
      positions: of the keys in k and v, padded to whole blocks.
      k, v: the cache. Either a key of every KV head, ``[B, S * K, H]``, where key ``c`` belongs to
        KV head ``c % K``; or ``slots_in_lanes``: a key of all KV heads, ``[B, K * H, S]``, and a
        query row is zero where other heads than its own have their part.

    Returns:
      ``(out, lse)`` in float32, the log-sum-exp in base 2; out is 0 where a row sees nothing.
    """
    num_batch, num_rows, width = q.shape
    num_splits, block_keys = static.num_splits, static.block_keys
    head_dim = width // static.num_kv_heads if static.slots_in_lanes else width
    num_blocks = positions.shape[2] // block_keys
    num_steps = jnp.maximum(jnp.max(-(-counts // num_splits)), 1)

    def block_of(split: Any, b: Any, step: Any, items_ref: Any, counts_ref: Any) -> Any:
        at, _ = _item(split, step, counts_ref[b], num_splits)
        return items_ref[b * num_blocks + at] >> 1

    num_pages = 0 if page_table is None else page_table.shape[1]

    def place(b: Any, block: Any, tables: Any) -> Any:
        """Where in k and v a row's block lies: which row or page, and which of its blocks."""
        if not num_pages:
            return b, block
        blocks_of_page = num_blocks // num_pages
        page = tables[0][b * num_pages + lax.div(block, jnp.int32(blocks_of_page))]
        return page, lax.rem(block, jnp.int32(blocks_of_page))

    def of_row(split: Any, b: Any, step: Any, *prefetched: Any) -> Any:
        return b, 0, 0

    def of_positions(split: Any, b: Any, step: Any, items: Any, counts: Any, *tables: Any) -> Any:
        return b, 0, block_of(split, b, step, items, counts)

    def of_block(split: Any, b: Any, step: Any, items: Any, counts: Any, *tables: Any) -> Any:
        row, block = place(b, block_of(split, b, step, items, counts), tables)
        return (row, 0, block) if static.slots_in_lanes else (row, block, 0)

    tables = () if page_table is None else (page_table.astype(jnp.int32).reshape(-1),)
    new_block = pl.BlockSpec((1, *new_k.shape[1:]), of_row)
    if static.slots_in_lanes:
        block = pl.BlockSpec((1, width, block_keys), of_block)
    else:
        block = pl.BlockSpec((1, block_keys, width), of_block)
    call = pl.pallas_call(
        functools.partial(_kernel, static=static, num_blocks=num_blocks, paged=num_pages > 0),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(tables),
            grid=(num_splits, num_batch, num_steps),
            in_specs=[
                pl.BlockSpec((1, num_rows, 4), of_row),
                pl.BlockSpec((1, num_rows, width), of_row),
                pl.BlockSpec((1, 1, new_positions.shape[2]), of_row),
                new_block,
                new_block,
                pl.BlockSpec((1, 1, block_keys), of_positions),
                block,
                block,
            ],
            out_specs=[
                pl.BlockSpec((1, 1, num_rows, head_dim), _of_split),
                pl.BlockSpec((1, 1, num_rows, 1), _of_split),
            ],
            scratch_shapes=[
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_splits, num_batch, num_rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_splits, num_batch, num_rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=static.interpret,
        name="swa_decode",
    )
    rows = (rules, q, new_positions, new_k, new_v, positions)
    return tuple(call(items, counts, *tables, *rows, k, v))


def _of_split(split: Any, b: Any, step: Any, *prefetched: Any) -> Any:
    """Every split has its own results, since cores work on them at the same time."""
    return split, b, 0, 0


def _item(split: Any, step: Any, count: Any, num_splits: int) -> tuple[Any, Any]:
    """Which item of the row a step takes, and whether it is its turn (else the last one again)."""
    share = lax.div(count + num_splits - 1, num_splits)
    last = jnp.minimum((split + 1) * share, count) - 1
    at = split * share + step
    return jnp.maximum(jnp.minimum(at, last), 0), at <= last


def _kernel(
    # prefetch
    items_ref,  # [B * blocks] int32, scalar memory
    counts_ref,  # [B] int32, scalar memory
    *refs,
    static: DecodeStatic,
    num_blocks: int,
    paged: bool,
) -> None:
    """Where rows share pages there is one reference more, which only the index maps read."""
    _attend(items_ref, counts_ref, *refs[paged:], static=static, num_blocks=num_blocks)


def _attend(
    items_ref,
    counts_ref,
    # in
    rules_ref,  # [1, R, 4] int32: position, window, sinks, KV head
    q_ref,  # [1, R, W], W = H, or K * H if slots lie in lanes
    new_positions_ref,  # [1, 1, M] int32
    new_k_ref,  # [1, M, W], or [1, W, M]
    new_v_ref,  # [1, M, W], or [1, W, M]
    positions_ref,  # [1, 1, C] int32
    k_ref,  # [1, C, W], or [1, W, C]
    v_ref,  # [1, C, W], or [1, W, C]
    # out
    out_ref,  # [1, 1, R, H] float32
    lse_ref,  # [1, 1, R, 1] float32, base 2
    # scratch
    largest_ref,  # [R, 1] float32: largest score so far, in base 2
    total_ref,  # [R, 1] float32: sum of 2^(score - largest)
    sum_ref,  # [R, W] float32: sum of 2^(score - largest) * v
    *,
    static: DecodeStatic,
    num_blocks: int,
) -> None:
    num_kv_heads, slots_in_lanes = static.num_kv_heads, static.slots_in_lanes
    scale, softcap = static.scale, static.softcap
    split, b, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at, takes_item = _item(split, step, counts_ref[b], static.num_splits)
    is_free = (items_ref[b * num_blocks + at] & 1) == 1

    def same_head(num_keys):
        """[R, num_keys]: the key belongs to the query row's KV head. None: every key does."""
        if slots_in_lanes or num_kv_heads == 1:
            return None
        row_1C = lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
        return rules_ref[0, :, 3:4] == lax.rem(row_1C, jnp.int32(num_kv_heads))

    def seen_by(positions_1C):
        """[R, C]: same head, and the visibility formula."""
        seen_RC = visible(
            rules_ref[0, :, 0:1],
            positions_1C,
            window=None if static.is_full else rules_ref[0, :, 1:2],
            num_sink_tokens=rules_ref[0, :, 2:3],
        )
        same_RC = same_head(positions_1C.shape[1])
        return seen_RC if same_RC is None else same_RC & seen_RC

    def add(k, v, seen_RC):
        """One step of the running softmax. Values that no row sees must be zero: 0 * NaN is NaN."""
        scores_RC = _product(q_ref[0], k, contract=(1, 0 if slots_in_lanes else 1))
        if softcap is None:
            scores_RC = scores_RC * (scale * _LOG2_E)
        else:
            scores_RC = (softcap * _LOG2_E) * jnp.tanh(scores_RC * (scale / softcap))
        if seen_RC is not None:
            scores_RC = jnp.where(seen_RC, scores_RC, -jnp.inf)
        before_R1 = largest_ref[...]
        largest_R1 = jnp.maximum(before_R1, jnp.max(scores_RC, axis=1, keepdims=True))
        weights_RC = jnp.exp2(scores_RC - largest_R1)
        shrink_R1 = jnp.exp2(before_R1 - largest_R1)
        largest_ref[...] = largest_R1
        total_ref[...] = shrink_R1 * total_ref[...] + jnp.sum(weights_RC, axis=1, keepdims=True)
        gathered_RW = _product(weights_RC.astype(v.dtype), v, contract=(1, int(slots_in_lanes)))
        sum_ref[...] = shrink_R1 * sum_ref[...] + gathered_RW

    hide = functools.partial(_hide, slots_in_lanes=slots_in_lanes)

    @pl.when(step == 0)
    def _start():
        largest_ref[...] = jnp.full_like(largest_ref, _LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((step == 0) & (split == 0))
    def _new_tokens():
        seen_RM = seen_by(new_positions_ref[0])
        add(new_k_ref[0], hide(new_v_ref[0], seen_RM), seen_RM)

    @pl.when(takes_item & is_free)
    def _free_block():
        add(k_ref[0], v_ref[0], same_head(positions_ref.shape[2]))

    @pl.when(takes_item & ~is_free)
    def _masked_block():
        seen_RC = seen_by(positions_ref[0])
        add(k_ref[0], hide(v_ref[0], seen_RC), seen_RC)

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish():
        total_R1 = total_ref[...]
        some_R1 = jnp.where(total_R1 > 0, total_R1, 1.0)
        sum_RH = sum_ref[...]
        if slots_in_lanes:  # of each row only its own head's part means something
            sum_RH = _own_head(sum_RH, rules_ref[0, :, 3:4], num_kv_heads)
        out_ref[0, 0] = sum_RH / some_R1
        lse_ref[0, 0] = largest_ref[...] + jnp.log2(some_R1)


def _product(x: Array, y: Array, *, contract: tuple[int, int]) -> Array:
    """A product with float32 sums; Mosaic rounds float32 operands unless told not to."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _own_head(sum_RW: Array, head_R1: Array, num_kv_heads: int) -> Array:
    """``[R, H]`` from ``[R, K * H]``: each row's part of its own KV head."""
    head_dim = sum_RW.shape[1] // num_kv_heads
    own_RH = jnp.zeros((sum_RW.shape[0], head_dim), sum_RW.dtype)
    for head in range(num_kv_heads):
        part_RH = sum_RW[:, head * head_dim : (head + 1) * head_dim]
        own_RH = jnp.where(head_R1 == head, part_RH, own_RH)
    return own_RH


def _hide(v: Array, seen_RC: Array, *, slots_in_lanes: bool) -> Array:
    """Puts zero in keys of v that no query row sees, empty slots and what lies past the cache's
    end.

    Keys lie along lanes in ``seen``. Where they lie along sublanes in v it takes a transpose, of
    eight equal rows since that is the smallest tile. In float32, where every TPU selects.
    """
    seen_1C = jnp.max(jnp.where(seen_RC, 1.0, 0.0), axis=0, keepdims=True)
    if slots_in_lanes:
        return jnp.where(seen_1C > 0, v.astype(jnp.float32), 0.0).astype(v.dtype)
    seen_C8 = jnp.broadcast_to(seen_1C, (8, seen_1C.shape[1])).T
    return jnp.where(seen_C8[:, :1] > 0, v.astype(jnp.float32), 0.0).astype(v.dtype)
