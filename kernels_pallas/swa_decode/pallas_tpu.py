"""The ``pallas_tpu`` backend of decoding: what it takes, its blocks, its work list, the final sum.

The cache is read where it lies, in the layout that XLA gives it, see ``has_slots_in_lanes``.

With H a multiple of 128, ``[B, S, K, H]`` seen as ``[B, S * K, H]`` is the same bytes, so a block
of slots is one matrix with the KV heads of a slot in rows that follow one another::

    slot        0            1            2              K = 4 KV heads
    row      0 1 2 3      4 5 6 7      8 9 10 11         KV head = row % K
            [ block 0 . . . . . . ] [ block 1 . . .

One product scores all query heads against all rows of a block, and a query head masks the rows of
other KV heads::

                 key row  0 1 2 3  4 5 6 7      N = 8 query heads, G = 2 to a KV head
    query head 0          x . . .  x . . .
    query head 1          x . . .  x . . .      K times the products that count, yet decoding waits
    query head 2          . x . .  . x . .      for the cache to arrive: a block is loaded once, for
       ...                                      all heads and all new tokens.

With any other H, slots lie along lanes, and a column holds the keys of all KV heads. Queries are
zero where other heads than their own have their part, so that again one product does for all::

    query head 0   [ q q q . . . . . . . . . ]             slot 0   1   2
    query head 1   [ q q q . . . . . . . . . ]   head 0  [  k   k   k
    query head 2   [ . . . q q q . . . . . . ]    ...       .   .   .
       ...                                       head 3     k   k   k  ]
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.chips import TPUS, generation_of
from kernels_pallas.layout import LANES, LOWEST, pad_end, round_up
from kernels_pallas.mask import per_row
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode.arguments import NEVER, DecodeArguments

MAX_NEW_TOKENS = 8

_HEAD_DIMS = (64, 80, 96, 128, 256)
_KEY_BYTES = 1 << 20  # of a block of K; V's is as large, and both are there twice
_SCORES = 1 << 18  # elements of the float32 scores of a block
_WORK_LIST_BYTES = min(chip.smem_bytes for chip in TPUS.values()) // 2
_VECTOR_BYTES = 14 << 20  # of the 16 MiB that a kernel has on v4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """How a cache is cut.

    Attributes:
      slots: cache slots of a block.
      splits: parts into which a row's blocks are dealt, each with its own softmax.
    """

    slots: int
    splits: int


def choose_blocks(arguments: DecodeArguments) -> DecodeBlocks:
    """Blocks as large as memory allows, whole lanes of 128 rows; a split for each core."""
    num_slots = arguments.cache_k.shape[1]  # of a row, or of a page
    keys_of_a_slot, width = _key_shape(arguments)
    key_bytes = width * arguments.q.dtype.itemsize
    num_keys = min(_KEY_BYTES // key_bytes, _SCORES // _num_query_rows(arguments))
    # A block is whole in slots and in lanes, and never longer than the cache.
    step = LANES // math.gcd(LANES, keys_of_a_slot)
    slots = min(num_keys // keys_of_a_slot, num_slots) // step * step
    if arguments.page_table is not None:
        while slots > step and num_slots % slots:  # a block is no part of two pages
            slots -= step
    # A single long row keeps all cores of a chip busy.
    splits = TPUS[generation_of(arguments.target)].cores
    return DecodeBlocks(slots=max(slots, step), splits=splits)


def has_slots_in_lanes(arguments: DecodeArguments) -> bool:
    """How XLA lays out a cache ``[B, S, K, H]``: it pads no lanes where it can help it.

    ::

        H = 128    [B, S, K, H]    read as [B, S * K, H]: a key of one KV head in a row
        H = 96     [B, K, H, S]    read as [B, K * H, S]: a key of all KV heads in a column
    """
    return arguments.q.shape[3] % LANES != 0


def _key_shape(arguments: DecodeArguments) -> tuple[int, int]:
    """How many keys the kernel sees in a slot, and how long each is."""
    num_kv_heads, head_dim = arguments.cache_k.shape[2:]
    return (
        (1, num_kv_heads * head_dim) if has_slots_in_lanes(arguments) else (num_kv_heads, head_dim)
    )


def limits(arguments: DecodeArguments) -> tuple[str, ...]:
    """What the kernel does not take, and what does not fit the chip's memories."""
    num_batch, num_new, _, head_dim = arguments.q.shape
    found = []
    if num_new > MAX_NEW_TOKENS:
        found.append(
            f"q: expected at most {MAX_NEW_TOKENS} new tokens a row, got {num_new} (pass fewer at "
            "a time)"
        )
    if arguments.q.dtype == jnp.float16:
        found.append("q: expected bfloat16 or float32, got float16 (TPUs do not multiply it)")
    if head_dim not in _HEAD_DIMS:
        found.append(
            f"q: expected a head dim of {_HEAD_DIMS}, got {head_dim} (pad it with zeros, and give "
            "the scale)"
        )
    step = LANES // math.gcd(LANES, _key_shape(arguments)[0])
    if arguments.page_table is not None and arguments.cache_k.shape[1] % step:
        found.append(
            f"cache_k: expected pages of a multiple of {step} slots, got "
            f"{arguments.cache_k.shape[1]} (make the pages larger)"
        )
    if found:
        return tuple(found)
    blocks = choose_blocks(arguments)
    vector_bytes = _vector_bytes(arguments, blocks)
    if vector_bytes > _VECTOR_BYTES:
        found.append(
            f"q: expected {num_new} new tokens and a block of the cache within "
            f"{_VECTOR_BYTES >> 20} MiB of vector memory, got {vector_bytes / 2**20:.1f} (pass "
            "fewer tokens at a time)"
        )
    num_blocks = -(-arguments.num_slots // blocks.slots)
    num_pages = 0 if arguments.page_table is None else arguments.page_table.shape[1]
    if 4 * num_batch * (num_blocks + num_pages) > _WORK_LIST_BYTES:
        found.append(
            f"cache_k: expected at most {_WORK_LIST_BYTES // 4} blocks of {blocks.slots} slots in "
            f"all rows, got {num_batch} x {num_blocks} (split the batch)"
        )
    return tuple(found)


def _vector_bytes(arguments: DecodeArguments, blocks: DecodeBlocks) -> int:
    """Bytes of queries, keys and values, each held twice, and of the running sum."""
    num_new, item_bytes = arguments.q.shape[1], arguments.q.dtype.itemsize
    keys_of_a_slot, width = _key_shape(arguments)
    num_keys = blocks.slots * keys_of_a_slot + round_up(num_new * keys_of_a_slot, LANES)
    num_rows = _num_query_rows(arguments)
    return width * (num_rows * (2 * item_bytes + 4) + 4 * num_keys * item_bytes)


def drawbacks(arguments: DecodeArguments) -> tuple[str, ...]:
    """Why ``auto`` takes another backend, although this one could: the cache would be copied."""
    if not copies_cache(arguments):
        return ()
    num_kv_heads, head_dim = arguments.cache_k.shape[2:]
    return (f"the cache, of {num_kv_heads} KV heads of {head_dim}, would be copied at each call",)


def copies_cache(arguments: DecodeArguments) -> bool:
    """Whether ``[B, S * K, H]`` is other bytes than the cache, so that XLA copies it.

    XLA pads no sublanes either, and lays the cache out in tiles of fewer rows, or K before S::

        H = 128, K = 8, 16, ... or 1    tiles of 8 rows                        the same bytes
        H = 128, K = 2 or 4             tiles of K rows, one after another     the same bytes
        H = 256, K = 2 or 4             tiles of K rows, left and right half   copied
        K = 10                          [B, K, S, H]                           copied
    """
    if has_slots_in_lanes(arguments):
        return False
    num_kv_heads, head_dim = arguments.cache_k.shape[2:]
    return not (
        num_kv_heads == 1 or num_kv_heads % 8 == 0 or (num_kv_heads in (2, 4) and head_dim == LANES)
    )


def compute(arguments: DecodeArguments) -> AttentionOutput:
    """Compiled for the TPU.

    Slots that no new token sees may hold NaN. In a slot that is seen, a NaN or infinity of one KV
    head reaches the others' query heads too, for they share the product with its zero weight.
    """
    return decode_in_blocks(arguments, blocks=choose_blocks(arguments))


def decode_in_blocks(
    arguments: DecodeArguments, *, blocks: DecodeBlocks, interpret: Any = False
) -> AttentionOutput:
    """The kernel with the given blocks; ``interpret``: in plain JAX, on any device."""
    # Imported here: only those who run it need the TPU half of Pallas to import.
    from kernels_pallas.swa_decode.pallas_tpu_kernels import DecodeStatic, attend_to_blocks

    arguments = _at_least_a_block(arguments, blocks.slots)
    q = arguments.q
    num_slots, num_kv_heads = arguments.num_slots, arguments.cache_k.shape[2]
    num_blocks = -(-num_slots // blocks.slots)
    items, counts = work_list(arguments, blocks.slots)
    positions_BS = arguments.cache_positions.astype(jnp.int32)
    positions_BS = jnp.where(positions_BS < 0, NEVER, positions_BS)
    missing = num_blocks * blocks.slots - num_slots
    positions_BS = pad_end(positions_BS, missing, axis=1, value=NEVER)

    slots_in_lanes = has_slots_in_lanes(arguments)
    q_rows = _query_rows(arguments, slots_in_lanes)
    missing_rows = _num_query_rows(arguments) - q_rows.shape[1]
    new_positions, new_k, new_v = _new_keys(arguments, slots_in_lanes)
    keys_of_a_slot = 1 if slots_in_lanes else num_kv_heads
    static = DecodeStatic(
        num_kv_heads=num_kv_heads,
        block_keys=blocks.slots * keys_of_a_slot,
        slots_in_lanes=slots_in_lanes,
        num_splits=blocks.splits,
        is_full=arguments.window is None,
        scale=arguments.scale,
        softcap=arguments.softcap,
        interpret=interpret,
    )
    out, lse = attend_to_blocks(
        static,
        items=items,
        counts=counts,
        page_table=arguments.page_table,
        rules=pad_end(_row_rules(arguments), missing_rows, axis=1, value=-1),
        q=pad_end(q_rows, missing_rows, axis=1),
        new_positions=new_positions,
        new_k=new_k,
        new_v=new_v,
        positions=_for_each_key(positions_BS, keys_of_a_slot),
        k=_keys(arguments.cache_k, slots_in_lanes),
        v=_keys(arguments.cache_v, slots_in_lanes),
    )
    out, lse = (x[:, : q_rows.shape[1]] for x in _combine(out, lse))
    # A row that sees nothing has the lowest score there is; see `attend_to_blocks`.
    lse = jnp.where(lse > LOWEST, lse * math.log(2), -jnp.inf).reshape(q.shape[:3])
    return AttentionOutput(out=out.reshape(q.shape).astype(q.dtype), lse=lse)


def work_list(
    arguments: DecodeArguments, block_slots: int
) -> tuple[Int[Array, " items"], Int[Array, " B"]]:
    """Which blocks each row needs, read off the visibility of its slots, in any order of positions.

    A full cache of 9 tokens in blocks of 4, one new token, window 3; 'x' is seen, '.' is not::

        slot      0 1 2 3 | 4 5 6 7 | 8 - - - | - - - -
        seen      . . . . | . . . x | x
                  left out   masked    masked   left out     items [1, 2], count 2

    Returns:
      items: ``2 * block + free`` of each row's needed blocks in turn, then filler. A free block is
        seen in full by every new token: it needs no mask, and nothing in it needs hiding.
      counts: needed blocks of each row.
    """
    seen_BnS = arguments.mask(arguments.cache_positions)
    num_batch, num_new, num_slots = seen_BnS.shape
    num_blocks = -(-num_slots // block_slots)
    seen = pad_end(seen_BnS, num_blocks * block_slots - num_slots, axis=2)
    seen = seen.reshape(num_batch, num_new, num_blocks, block_slots)
    needed, free = jnp.any(seen, axis=(1, 3)), jnp.all(seen, axis=(1, 3))
    item = 2 * jnp.arange(num_blocks, dtype=jnp.int32) + free.astype(jnp.int32)
    items = jnp.sort(jnp.where(needed, item, NEVER), axis=1)
    items = jnp.where(items == NEVER, 0, items).reshape(-1)
    return items, jnp.sum(needed, axis=1, dtype=jnp.int32)


def _row_rules(arguments: DecodeArguments) -> Int[Array, "B R 4"]:
    """Position, window, sinks and KV head of each query row; rows are ``[token, head]``."""
    num_batch, num_new, num_heads, _ = arguments.q.shape
    num_groups = num_heads // arguments.cache_k.shape[2]
    shape = (num_batch, num_new, num_heads)
    # A full row has a window that nothing is older than.
    window = per_row(NEVER if arguments.window is None else arguments.window)[:, None]
    if arguments.q_full is not None:
        window = jnp.where(arguments.q_full, NEVER, window)
    columns = (
        arguments.q_positions[:, :, None],
        window[:, :, None],
        per_row(arguments.num_sink_tokens)[:, None, None],
        jnp.arange(num_heads, dtype=jnp.int32) // num_groups,
    )
    columns = [jnp.broadcast_to(column.astype(jnp.int32), shape) for column in columns]
    return jnp.stack(columns, axis=-1).reshape(num_batch, num_new * num_heads, 4)


def _for_each_key(positions_BS: Int[Array, "B S"], keys_of_a_slot: int) -> Int[Array, "B 1 P"]:
    """Each slot's position once for each of its keys, in whole lanes: ``jnp.repeat``, on MXUs.

    XLA repeats along lanes element by element: for 128k slots and 8 heads 268,000 cycles on v5e,
    a quarter of what reading such a cache takes, and 40 seconds of compiling. A product with zeros
    and ones takes 15,000 (both are the compiler's estimates). It is exact on halves of 16 bits::

                       row  0 1 2 3 4 5 6 7
                 slot 0   [ 1 1 1 1 . . . . ]
        [ 7 9 ]  slot 1   [ . . . . 1 1 1 1 ]   =   [ 7 7 7 7 9 9 9 9 ]        K = 4
    """
    num_batch, num_slots = positions_BS.shape
    if keys_of_a_slot == 1:
        return positions_BS[:, None]
    step = LANES // math.gcd(LANES, keys_of_a_slot)
    groups_BSs = pad_end(positions_BS, -num_slots % step, axis=1).reshape(num_batch, -1, step)
    row_of_slot = jnp.repeat(jnp.eye(step, dtype=jnp.float32), keys_of_a_slot, axis=1)
    high, low = (
        jnp.dot(half.astype(jnp.float32), row_of_slot, precision="highest").astype(jnp.int32)
        for half in (groups_BSs >> 16, groups_BSs & 0xFFFF)
    )
    positions = ((high << 16) | low).reshape(num_batch, 1, -1)
    return positions[:, :, : num_slots * keys_of_a_slot]


def _new_keys(
    arguments: DecodeArguments, slots_in_lanes: bool
) -> tuple[Int[Array, "B 1 M"], Float[Array, "B _ _"], Float[Array, "B _ _"]]:
    """Positions, keys and values of the new tokens as one more block, in whole lanes.

    Without new tokens the block has nothing to see. They are only padded here: XLA would fuse more
    with the write of the cache that follows, and then copy the cache so as to write it first.
    """
    num_batch, num_new, _, head_dim = arguments.q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    new_k, new_v, positions = arguments.new_k, arguments.new_v, arguments.q_positions
    if new_k is None or new_v is None:
        new_k = new_v = jnp.zeros((num_batch, num_new, num_kv_heads, head_dim), arguments.q.dtype)
        positions = jnp.full_like(positions, -1)
    keys_of_a_slot = 1 if slots_in_lanes else num_kv_heads
    missing, axis = -num_new * keys_of_a_slot % LANES, 2 if slots_in_lanes else 1
    positions = jnp.where(positions < 0, NEVER, positions).astype(jnp.int32)
    positions = jnp.repeat(positions, keys_of_a_slot, axis=1)[:, None]
    positions = pad_end(positions, missing, axis=2, value=NEVER)
    new_k, new_v = (pad_end(_keys(x, slots_in_lanes), missing, axis=axis) for x in (new_k, new_v))
    return positions, new_k, new_v


def _keys(x_BSKH: Float[Array, "B S K H"], slots_in_lanes: bool) -> Float[Array, "B _ _"]:
    """``[B, S * K, H]``, or ``[B, K * H, S]``: whichever is the same bytes."""
    num_batch, num_slots, num_kv_heads, head_dim = x_BSKH.shape
    if slots_in_lanes:
        return x_BSKH.transpose(0, 2, 3, 1).reshape(num_batch, num_kv_heads * head_dim, num_slots)
    return x_BSKH.reshape(num_batch, num_slots * num_kv_heads, head_dim)


def _query_rows(arguments: DecodeArguments, slots_in_lanes: bool) -> Float[Array, "B R W"]:
    """Rows ``[token, head]`` as wide as a key; with slots in lanes, zero in other heads' parts."""
    num_batch, num_new, num_heads, head_dim = arguments.q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    q_rows = arguments.q.reshape(num_batch, num_new * num_heads, head_dim)
    if not slots_in_lanes:
        return q_rows
    head_of_row = jnp.tile(jnp.arange(num_heads) // (num_heads // num_kv_heads), num_new)
    is_own_RK1 = head_of_row[:, None, None] == jnp.arange(num_kv_heads)[:, None]
    return jnp.where(is_own_RK1, q_rows[:, :, None], 0).reshape(*q_rows.shape[:2], -1)


def _combine(
    out: Float[Array, "X B R H"], lse: Float[Array, "X B R 1"]
) -> tuple[Float[Array, "B R H"], Float[Array, "B R 1"]]:
    """One softmax from those of the splits; ``lse`` is in base 2, very low where nothing is seen.

    ::

        blocks of a row    [ 0 1 2 3 | 4 5 6 ]
        splits               out, lse  out, lse      out = sum of out * 2^lse / sum of 2^lse
    """
    if out.shape[0] == 1:
        return out[0], lse[0]
    largest = jnp.max(lse, axis=0)
    weights = jnp.exp2(lse - largest)
    total = jnp.sum(weights, axis=0)
    return jnp.sum(weights * out, axis=0) / total, largest + jnp.log2(total)


def _at_least_a_block(arguments: DecodeArguments, slots: int) -> DecodeArguments:
    """A cache shorter than a block, which is less than 128 slots, is copied into one."""
    missing = slots - arguments.cache_k.shape[1]
    if missing <= 0 or arguments.page_table is not None:
        return arguments
    return dataclasses.replace(
        arguments,
        cache_k=pad_end(arguments.cache_k, missing, axis=1),
        cache_v=pad_end(arguments.cache_v, missing, axis=1),
        cache_positions=pad_end(arguments.cache_positions, missing, axis=1, value=-1),
    )


def _num_query_rows(arguments: DecodeArguments) -> int:
    """Query rows ``[token, head]``, up to whole tiles of 16 rows."""
    return round_up(arguments.q.shape[1] * arguments.q.shape[2], 16)
