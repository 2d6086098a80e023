"""Who sees whom: the one visibility formula, and the block map derived from it.

The formula is written once, in :func:`visible`, with operators only, so that numpy, jnp and the
iotas inside a kernel all use it. Everything else here turns the caller's lengths and segments into
the few integers a row that the formula and the block map need.

One segment, window 4, 2 sink tokens, row 7 full::

             key  0 1 2 3 4 5 6 7
    query 0       s . . . . . . .      s  sink token (also in the window for the first rows)
          1       s s . . . . . .      x  window (counts the query itself)
          2       s s x . . . . .      f  seen because the row is full
          3       s s x x . . . .
          4       s s x x x . . .
          5       s s x x x x . .
          6       s s . x x x x .
          7       f f f f f f f f
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels_pallas.layout import pad_end, running_max, running_sum

# One int for all rows (traced or not), or an int32 array [B]: a policy per batch row.
IntOrPerRow = int | Int[Array, ""] | Int[Array, " B"]


def visible(
    q_pos: Any,
    k_pos: Any,
    *,
    window: Any,
    num_sink_tokens: Any = 0,
    q_full: Any = False,
    q_segment: Any = None,
    k_segment: Any = None,
) -> Any:
    """True where the query at ``q_pos`` attends to the key at ``k_pos``.

    ``k_pos <= q_pos`` and the same segment and (the row is full, or ``q_pos - k_pos < window``, or
    ``k_pos < num_sink_tokens``). The window counts the query itself. Sinks are the first tokens of
    the segment, at their own positions (arXiv 2512.10411, section 3).

    Args:
      q_pos: positions of the queries *within their segment*, any integer array or scalar.
      k_pos: positions of the keys within their segment. All arguments broadcast together:
        ``[T, 1]`` against ``[S]`` gives ``[T, S]``; a per-batch window is ``[B, 1, 1]``.
      window: number of keys a row sees up to and including itself; ``None`` makes every row full.
      num_sink_tokens: number of leading tokens of the segment that stay visible.
      q_full: bool, rows that see every earlier key of their segment.
      q_segment: segment of each query; ``None`` when there is a single one.
      k_segment: segment of each key; given exactly when ``q_segment`` is.

    Returns:
      Bool, the broadcast shape; True means "attend". Lengths are the caller's: a valid row (index
      below its length) never sees a padding key, because ``k_pos <= q_pos``.

    Examples:
      >>> import numpy as np
      >>> i = np.arange(5)
      >>> print(visible(i[:, None], i, window=2, num_sink_tokens=1).astype(int))
      [[1 0 0 0 0]
       [1 1 0 0 0]
       [1 1 1 0 0]
       [1 0 1 1 0]
       [1 0 0 1 1]]
    """
    seen = k_pos <= q_pos
    if window is not None:
        seen = seen & (q_full | (q_pos - k_pos < window) | (k_pos < num_sink_tokens))
    if q_segment is not None:
        seen = seen & (q_segment == k_segment)
    return seen


def segment_begins(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every segment (a maximal run of one id)."""
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.concatenate([jnp.ones_like(changes, shape=(changes.shape[0], 1)), changes], axis=1)


def segment_starts(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of each token's segment; a segment is a maximal run of one id.

    >>> print(segment_starts(jnp.array([[3, 3, 5, 5, 5]])))
    [[0 0 2 2 2]]
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    begins_BT = segment_begins(segment_ids_BT)
    return running_max(jnp.where(begins_BT, index_T, 0))


def segment_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its segment: index minus segment start.

    >>> print(segment_positions(jnp.array([[3, 3, 5, 5, 5]])))
    [[0 1 0 1 2]]
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    return index_T - segment_starts(segment_ids_BT)


def per_row(value: IntOrPerRow) -> Int[Array, "#B"]:
    """``value`` as an int32 array ``[1]`` or ``[B]``."""
    return jnp.asarray(value, jnp.int32).reshape(-1)


def rows_at(x_BS: Array, offset_B: Int[Array, " B"], num_rows: int) -> Array:
    """``x_BS[b, offset_B[b] : offset_B[b] + num_rows]``."""
    if num_rows == x_BS.shape[1]:
        return x_BS
    return jax.vmap(lambda x, at: lax.dynamic_slice(x, (at,), (num_rows,)))(x_BS, offset_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowInfo:
    """The integers of each query row and key that :func:`visible` and :func:`block_map` read.

    Segments are numbered by run (0, 1, 2, ... along the row), so an id that comes back later in the
    row names another segment.
    """

    q_index: Int[Array, "B T"]  # absolute index: q_offset + t
    q_start: Int[Array, "B T"]  # absolute index at which the row's segment starts
    q_segment: Int[Array, "B T"] | None
    q_full: Bool[Array, "B T"] | None  # None: no row is full unless all are
    q_valid: Bool[Array, "B T"]  # index below the length
    k_start: Int[Array, "B S"] | None
    k_segment: Int[Array, "B S"] | None

    @property
    def q_pos(self) -> Int[Array, "B T"]:
        """Position within the segment."""
        return self.q_index - self.q_start


def row_info(
    *,
    shape: tuple[int, int, int],
    lengths: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B S"] | None,
    q_offset: IntOrPerRow,
    q_full: Bool[Array, "B T"] | None,
) -> RowInfo:
    """Positions, segments and validity of every row; ``shape`` is ``(B, T, S)``."""
    num_batch, num_queries, num_keys = shape
    offset_B = jnp.broadcast_to(per_row(q_offset), (num_batch,))
    q_index = offset_B[:, None] + jnp.arange(num_queries, dtype=jnp.int32)
    all_keys_B = jnp.full((num_batch,), num_keys, jnp.int32)
    length_B = all_keys_B if lengths is None else jnp.minimum(lengths.astype(jnp.int32), num_keys)
    q_start, q_segment, k_start, k_segment = jnp.zeros_like(q_index), None, None, None
    if segment_ids is not None:
        k_start = segment_starts(segment_ids)
        k_segment = running_sum(segment_begins(segment_ids)) - 1
        q_start = rows_at(k_start, offset_B, num_queries)
        q_segment = rows_at(k_segment, offset_B, num_queries)
    return RowInfo(
        q_index=q_index,
        q_start=q_start,
        q_segment=q_segment,
        q_full=q_full,
        q_valid=q_index < length_B[:, None],
        k_start=k_start,
        k_segment=k_segment,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Which key blocks each query block needs, as block numbers; ranges are half open.

    Keys of one query block (rows a..z, windowed, one segment that starts at s)::

        block   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |
        keys      s k                 a-W+1         a     z
                [sink ]  skipped    [ mask ][  free ][ mask     ]
        sink_first=0, sink_end=1    first=3, unmasked_first=4, unmasked_end=6, end=8

    ``[sink_first, sink_end)`` and ``[first, end)`` never overlap; together they hold every visible
    pair of the valid rows. ``[unmasked_first, unmasked_end)``, a part of ``[first, end)``, is
    visible to every valid row in full. A query block without valid rows has empty ranges.
    """

    sink_first: Int[Array, "B Q"]
    sink_end: Int[Array, "B Q"]
    first: Int[Array, "B Q"]
    unmasked_first: Int[Array, "B Q"]
    unmasked_end: Int[Array, "B Q"]
    end: Int[Array, "B Q"]


def block_map(
    rows: RowInfo,
    *,
    window: IntOrPerRow | None,
    num_sink_tokens: IntOrPerRow,
    block_q: int,
    block_kv: int,
) -> BlockMap:
    """The block map of ``rows``, in O(T) reductions and O(T / block_q) arithmetic, inside jit.

    Row r reads the keys ``low(r) .. r`` without a gap, where ``low(r)`` is its segment's start if
    it is full and else ``max(r - window + 1, start)``; besides, its segment's sinks. Neither
    ``r`` nor the starts ever fall along the rows, so

    * the union over a block's rows is ``min low .. last row``: no gap, hence ``[first, end)`` is
      tight;
    * sinks outside that union can only be those of the *first* row's segment, and only when all of
      that segment's rows in the block are windowed: any other segment starts inside the block;
    * a block is visible in full when it begins at or after ``max low`` and ends at or before the
      first row.

    ``T`` need not be a multiple of ``block_q``: the last block is cut short.
    """
    num_batch, num_queries = rows.q_index.shape
    num_blocks = -(-num_queries // block_q)
    low_BT = rows.q_start
    if window is not None:
        low_BT = jnp.maximum(rows.q_index - per_row(window)[:, None] + 1, rows.q_start)
        if rows.q_full is not None:
            low_BT = jnp.where(rows.q_full, rows.q_start, low_BT)

    def blocks(x_BT: Array, fill: int) -> Array:
        x_BT = jnp.where(rows.q_valid, x_BT, fill)
        x_BT = pad_end(x_BT, -num_queries % block_q, axis=1, value=fill)
        return x_BT.reshape(num_batch, num_blocks, block_q)

    far = jnp.iinfo(jnp.int32).max
    last = jnp.max(blocks(rows.q_index, -1), axis=2)
    min_low = jnp.min(blocks(low_BT, far), axis=2)
    max_low = jnp.max(blocks(low_BT, -1), axis=2)
    begin = rows.q_index[:, ::block_q]
    segment_start = rows.q_start[:, ::block_q]
    some = last >= 0  # the block has a valid row; valid rows come first

    first = jnp.where(some, min_low // block_kv, 0)
    end = jnp.where(some, last // block_kv + 1, 0)
    unmasked_first = jnp.clip(-(-max_low // block_kv), first, end)
    unmasked_end = jnp.clip((begin + 1) // block_kv, unmasked_first, end)
    sinks = per_row(num_sink_tokens)[:, None]
    sink_first = jnp.minimum(segment_start // block_kv, first)
    behind_sinks = segment_start + jnp.minimum(sinks, far - segment_start)
    sink_end = jnp.clip(-(-behind_sinks // block_kv), sink_first, first)
    if window is None:
        sink_end = sink_first
    else:
        sink_end = jnp.where(some & (sinks > 0), sink_end, sink_first)
    return BlockMap(
        sink_first=sink_first,
        sink_end=sink_end,
        first=first,
        unmasked_first=unmasked_first,
        unmasked_end=jnp.where(some, unmasked_end, unmasked_first),
        end=end,
    )
