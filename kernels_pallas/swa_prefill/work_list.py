"""The work list of a kernel: which pairs of blocks it visits, one int32 each, built inside jit.

Four query blocks, a window of two key blocks and one key, sinks in key block 0 (``s`` sinks alone,
``m`` a pair that needs the mask, ``.`` one that every row sees in full)::

               key block                 item   query  key  flags
               0  1  2  3                0      0      0    masked first last
    query  0   m                         1      1      0           first
           1   .  m                      2      1      1    masked       last
           2   m  .  m                   3      2      0    masked first
           3   s  m  .  m                ...
                                         6      3      0    masked first
                                         ...    the list ends at a traced length

An item is ``major block | minor block | last | first | masked``, highest bits first. The forward
pass and dq walk query blocks (major) and each one's key blocks; dk and dv walk the same pairs
by key block. Blocks are numbered through the batch: those of row 1 follow those of row 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels_pallas.chips import TPUS
from kernels_pallas.layout import running_sum
from kernels_pallas.mask import BlockMap

MASKED, FIRST, LAST = 1, 2, 4
_FLAG_BITS = 3

# The scalar memory that the list may take; the rest is left to the compiler.
SMEM_BYTES = min(chip.smem_bytes for chip in TPUS.values()) - (32 << 10)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkList:
    """Packed items in order; there is always at least one.

    ``items[1 : count + 1]`` are the list. An item without flags stands before and after it, of the
    same blocks as the first and the last: kernels look one item back.
    """

    items: Int[Array, " M+2"]
    count: Int[Array, ""]


def minor_bits(num_minor_blocks: int) -> int:
    """Bits of an item that number its minor block."""
    return max(num_minor_blocks - 1, 1).bit_length()


def major_of(item: Any, *, num_minor_blocks: int) -> Any:
    """The block that the kernel accumulates over."""
    return item >> (_FLAG_BITS + minor_bits(num_minor_blocks))


def minor_of(item: Any, *, num_minor_blocks: int) -> Any:
    """The block that changes from item to item."""
    return (item >> _FLAG_BITS) & ((1 << minor_bits(num_minor_blocks)) - 1)


def _pack(major: Array, minor: Array, masked: Array, *, count: Array, num_minor: int) -> WorkList:
    """Items of sorted ``major``, with the flags of the first and the last item of each."""
    index = jnp.arange(major.shape[0], dtype=jnp.int32)
    used = index < count
    changes = major[1:] != major[:-1]
    edge = jnp.ones((1,), bool)
    first = jnp.concatenate([edge, changes])
    last = jnp.concatenate([changes, edge]) | (index == count - 1)
    flags = masked * MASKED + first * FIRST + last * LAST
    items = ((major << minor_bits(num_minor)) | minor) << _FLAG_BITS | flags.astype(jnp.int32)
    # An empty list does one pair that nobody reads: a grid has at least one step.
    items = jnp.where(index == 0, jnp.where(used, items, MASKED | FIRST | LAST), items)
    count = jnp.maximum(count, 1)
    end = items[count - 1]
    items = jnp.concatenate([items[:1], jnp.where(index < count, items, end), end[None]])
    listed = (jnp.arange(items.shape[0]) > 0) & (jnp.arange(items.shape[0]) <= count)
    items = jnp.where(listed, items, items >> _FLAG_BITS << _FLAG_BITS)
    return WorkList(items=items.astype(jnp.int32), count=count)


def _spread(
    counts: Int[Array, " blocks"], most_items: int
) -> tuple[Int[Array, " M"], Int[Array, " M"], Int[Array, ""]]:
    """Block and place in it of each item, and how many items there are.

    >>> block, place, count = _spread(jnp.array([2, 0, 3]), 6)
    >>> print(block[:5], place[:5], count)
    [0 0 2 2 2] [0 1 0 1 2] 5
    """
    ends = running_sum(counts)
    starts = ends - counts
    # How many blocks start at or before item i. Empty ones share a start.
    begun = jnp.zeros((most_items,), jnp.int32).at[starts].add(1, mode="drop")
    block = running_sum(begun) - 1
    return block, jnp.arange(most_items, dtype=jnp.int32) - starts[block], ends[-1]


def build_work_list(blocks: BlockMap, *, num_kv_blocks: int, most_items: int) -> WorkList:
    """Pairs by query block, the sinks' before the window's; O(items) and no larger array.

    Args:
      blocks: which key blocks each query block needs, ``[B, Q]``.
      num_kv_blocks: key blocks of one batch row.
      most_items: static length of the list, from :func:`count_items_at_most`.
    """
    num_batch, num_q_blocks = blocks.first.shape
    flat = jax.tree.map(jnp.ravel, blocks)
    num_sinks = flat.sink_end - flat.sink_first
    block, place, count = _spread(num_sinks + flat.end - flat.first, most_items)
    after_sinks = place - num_sinks[block]
    kv = jnp.where(after_sinks < 0, flat.sink_first[block] + place, flat.first[block] + after_sinks)
    free = (kv >= flat.unmasked_first[block]) & (kv < flat.unmasked_end[block])
    return _pack(
        block,
        block // num_q_blocks * num_kv_blocks + kv,
        ~free,
        count=count,
        num_minor=num_batch * num_kv_blocks,
    )


def build_work_list_by_key(
    blocks: BlockMap, *, num_kv_blocks: int, most_items: int
) -> tuple[WorkList, Bool[Array, " columns"]]:
    """The same pairs by key block, and which key blocks are in the list at all.

    The query blocks that need a key block may be any, so this counts them along each column of the
    pairs of blocks, and an item finds its own by halving::

        query block      0  1  2  3  4
        needed           .  x  .  x  x
        counted so far   0  1  1  2  3       the item at place 1 is query block 3

    Args:
      blocks, num_kv_blocks, most_items: as in :func:`build_work_list`.
    """
    num_batch, num_q_blocks = blocks.first.shape
    kv = jnp.arange(num_kv_blocks, dtype=jnp.int32)[None, :, None]
    of_row = jax.tree.map(lambda x: x[:, None, :], blocks)
    is_sink = (of_row.sink_first <= kv) & (kv < of_row.sink_end)
    needed = is_sink | ((of_row.first <= kv) & (kv < of_row.end))  # [B, key, query]
    counted = running_sum(needed.reshape(-1, num_q_blocks))
    column, place, count = _spread(counted[:, -1], most_items)

    def halve(i: Any, row: Array) -> Array:
        further = row + (1 << (num_halvings - 1 - i))
        short = counted[column, jnp.minimum(further, num_q_blocks) - 1] <= place
        return jnp.where(short, further, row)

    num_halvings = num_q_blocks.bit_length()
    row = jax.lax.fori_loop(0, num_halvings, halve, jnp.zeros_like(column))
    # Beyond the list's end the search runs out of the column.
    row = column // num_kv_blocks * num_q_blocks + jnp.minimum(row, num_q_blocks - 1)
    kv = column % num_kv_blocks
    flat = jax.tree.map(jnp.ravel, blocks)
    free = (kv >= flat.unmasked_first[row]) & (kv < flat.unmasked_end[row])
    work = _pack(column, row, ~free, count=count, num_minor=num_batch * num_q_blocks)
    return work, counted[:, -1] > 0


def count_items_at_most(
    *,
    shape: tuple[int, int, int],
    window: int | None,
    num_sink_tokens: int | None,
    q_offset: int | None,
    block_q: int,
    block_kv: int,
) -> int:
    """Length that holds the work list whatever the traced values are.

    Args:
      shape: ``(B, T, S)``.
      window: None: some rows may see all keys before them.
      num_sink_tokens: None: known at run time only.
      q_offset: None: known at run time only.
      block_q: rows of a query block.
      block_kv: keys of a key block.
    """
    num_batch, num_queries, num_keys = shape
    offset = num_keys - num_queries if q_offset is None else q_offset
    ends = np.minimum(np.arange(block_q, num_queries + block_q, block_q), num_queries) + offset
    per_block = -(-ends // block_kv)
    if window is not None and num_sink_tokens is not None:
        most = _blocks_touched(window - 1 + min(block_q, num_queries), block_kv)
        most += _blocks_touched(num_sink_tokens, block_kv)
        per_block = np.minimum(per_block, most)
    return num_batch * int(per_block.sum())


def _blocks_touched(num_keys: int, block_kv: int) -> int:
    """Most blocks that hold some of that many neighbouring keys."""
    return 0 if num_keys == 0 else (num_keys - 2) // block_kv + 2


def list_limits(*, num_items: int, num_rows: int, num_columns: int) -> str | None:
    """Why a work list of that size cannot be used; None when it can."""
    if 4 * num_items > SMEM_BYTES:
        return (
            f"a work list of {num_items} items needs {4 * num_items} bytes of scalar memory, of "
            f"which there are {SMEM_BYTES}"
        )
    if minor_bits(num_rows) + minor_bits(num_columns) + _FLAG_BITS > 31:
        return f"{num_rows} query blocks and {num_columns} key blocks do not fit an int32 item"
    return None
