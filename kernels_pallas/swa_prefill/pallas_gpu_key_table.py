"""Which rows the tiles of keys are read by, in the gradient of ``pallas_gpu``, and in which pieces.

Every row reads the sinks, so that their tile would take longer than all others together: the work
of long tiles is cut into pieces, whose sums are added at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end
from kernels_pallas.mask import IntOrPerRow, RowInfo, per_row
from kernels_pallas.swa_prefill.pallas_gpu_kernels import BLOCK_Q, WARPGROUPS

KEYS_OF_TILE = WARPGROUPS * BLOCK_Q
"""Keys of a tile of dk and dv."""

_FAR = jnp.iinfo(jnp.int32).max


def key_table(
    rows: RowInfo,
    *,
    window: IntOrPerRow | None,
    num_sink_tokens: IntOrPerRow,
    num_keys: int,
    num_rows: int,
) -> tuple[Int[Array, "B L 11"], Int[Array, "B Q"]]:
    """Which blocks of 64 rows read a tile of keys, and the blocks that have full rows.

    Blocks are numbered along the rows. As in ``pallas_gpu_kernels.step_table`` a line has the ends
    of its kinds of steps and what a step's number lacks of its block's; the last kind, full rows
    beyond the others, are places in the second array instead. Further columns and lines are those
    of :func:`cut`. `num_rows` are those of whole tiles.
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
        return jax.vmap(lambda x: _place(x, key_J, side=side))(x_BQ)

    some = count(first, jnp.full((1,), _FAR, jnp.int32), "left")  # blocks with valid rows
    seen_from = jnp.minimum(count(last, begin, "left"), some)
    seen_to = jnp.clip(count(least_low, end, "right"), seen_from, some)
    segment_to = jnp.clip(count(least_start, end, "right"), seen_to, some)
    if window is not None:
        sinks_B1 = per_row(num_sink_tokens)[:, None]
        reach = most_start + jnp.minimum(sinks_B1, _FAR - most_start)
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
        full_from = jax.vmap(_place)(listed, seen_to)
        full_to = jnp.maximum(jax.vmap(_place)(listed, segment_to), full_from)
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
    table = jnp.stack(columns, axis=2).astype(jnp.int32)
    return cut(table, choose_num_pieces(num_tiles)), listed


def _place(x: Int[Array, " Q"], at: Int[Array, " J"], *, side: str = "left") -> Int[Array, " J"]:
    """Where these numbers belong among those of x, which do not fall.

    By comparing all with all, in one step; a search by halves is a loop of small programs.
    """
    return jnp.searchsorted(x, at, side=side, method="compare_all").astype(jnp.int32)


def choose_num_pieces(num_tiles: int) -> int:
    """Pieces beyond one a tile: as many as keep the sinks' tile from being the last to end."""
    return min(64, num_tiles // 4)


def cut(table: Int[Array, "B J 8"], num_pieces: int) -> Int[Array, "B L 11"]:
    """The tiles' work in pieces of about the same length.

    Every row reads the sinks, so that their tile would take as long as all others together. With
    P more pieces none has more than a P-th of all steps::

        tiles   0 0 0 0 0 0 0 | 1 1 | 2 2 | 3 3 |         one piece each, and at their ends P more
        lines   0 0 0 ........ 0 0 0, 0 | 0 0 0 | 1 1 | 2 2 | 3 3
                [ further pieces      ] [ each tile's first     ]

    A line is that of the piece's tile, with three more columns: the tile, the piece's first step,
    and the one behind its last. Those of the P pieces that no tile needs have no steps.
    """
    num_tiles = table.shape[1]
    total_BJ = table[:, :, 3]
    tiles = jnp.broadcast_to(jnp.arange(num_tiles, dtype=jnp.int32), total_BJ.shape)
    if num_pieces == 0:
        ends = jnp.stack([tiles, jnp.zeros_like(tiles), total_BJ], axis=2)
        return jnp.concatenate([table, ends], axis=2)
    longest_B1 = jnp.maximum(-(-jnp.sum(total_BJ, axis=1, keepdims=True) // num_pieces), 1)
    more_BJ = jnp.maximum(-(-total_BJ // longest_B1), 1) - 1
    before_BJ = jnp.cumsum(more_BJ, axis=1)
    number = jnp.arange(num_pieces, dtype=jnp.int32)
    tile_BP = jax.vmap(lambda x: _place(x, number, side="right"))(before_BJ)
    is_used = tile_BP < num_tiles
    tile_BP = jnp.minimum(tile_BP, num_tiles - 1)

    def of_tile(x: Array) -> Array:
        return jnp.take_along_axis(x, tile_BP, axis=1)

    begin_BP = (number - of_tile(before_BJ - more_BJ) + 1) * longest_B1
    end_BP = jnp.minimum(begin_BP + longest_B1, of_tile(total_BJ))
    further = [jnp.where(is_used, x, 0) for x in (tile_BP, begin_BP, end_BP)]
    first = (tiles, jnp.zeros_like(tiles), jnp.minimum(total_BJ, longest_B1))
    ends = [jnp.concatenate(pair, axis=1) for pair in zip(further, first, strict=True)]
    lines = jnp.take_along_axis(table, ends[0][:, :, None], axis=1)
    return jnp.concatenate([lines, jnp.stack(ends, axis=2)], axis=2).astype(jnp.int32)


def joined(
    x: Float[Array, "B S K H"], further: Float[Array, "B R K H"], lines: Int[Array, "B P 11"]
) -> Float[Array, "B S K H"]:
    """With the sums of further pieces, which are rounded apart and added in float32."""
    num_batch, num_pieces, _ = lines.shape
    is_used, tile = lines[:, :, 10] > 0, lines[:, :, 8]
    pieces = further.reshape(num_batch, num_pieces, KEYS_OF_TILE, *x.shape[2:])
    pieces = jnp.where(is_used[:, :, None, None, None], pieces, 0).astype(jnp.float32)
    # A tile's pieces follow one another. The first of them takes the sum.
    same = (tile[:, :, None] == tile[:, None]).astype(jnp.float32)
    sums = jnp.einsum("BPp,Bp...->BP...", same, pieces, precision="highest")
    is_first = is_used & (jnp.diff(tile, axis=1, prepend=-1) != 0)
    tiles = x.reshape(num_batch, -1, KEYS_OF_TILE, *x.shape[2:])
    at = jnp.where(is_first, tile, tiles.shape[1])
    row = jnp.arange(num_batch)[:, None]
    before = tiles[row, jnp.minimum(at, tiles.shape[1] - 1)].astype(jnp.float32)
    tiles = tiles.at[row, at].set((before + sums).astype(x.dtype), mode="drop")
    return tiles.reshape(x.shape)
