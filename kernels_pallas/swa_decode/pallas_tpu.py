"""The ``pallas_tpu`` backend of decoding: what it takes, its blocks, its work list, the final sum.

The cache is read where it lies (for H a multiple of 128, see ``copies_cache``). ``[B, S, K, H]``
seen as ``[B, S * K, H]`` is the same bytes, so a block of slots is one matrix with the KV heads of
a slot in rows that follow one another::

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
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import register_backend
from kernels_pallas.mask import per_row
from kernels_pallas.swa_decode.arguments import DecodeArguments

MAX_NEW_TOKENS = 8
NEVER = jnp.iinfo(jnp.int32).max
"""Position of a slot that no query sees: it comes after every query. Also a full row's window."""

_HEAD_DIMS = (64, 80, 96, 128, 256)
_LANES = 128
_WORK_LIST_BYTES = 512 << 10  # of the 1 MiB of scalar memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """How a cache is cut.

    Attributes:
      slots: cache slots of a block.
      splits: parts into which a row's blocks are dealt, each with its own softmax.
    """

    slots: int
    splits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Limits:
    key_bytes: int  # of a block of K; V's is as large, and both are there twice
    scores: int  # elements of the float32 scores of a block
    splits: int  # cores of a chip: a single long row keeps all of them busy


_ONE_CORE = _Limits(key_bytes=1 << 20, scores=1 << 18, splits=1)
_TWO_CORES = dataclasses.replace(_ONE_CORE, splits=2)
# By the device kind that JAX reports. Anything else is cut like a chip with one core.
_LIMITS = {"TPU v4": _TWO_CORES, "TPU v5": _TWO_CORES, "TPU v5p": _TWO_CORES}


def choose_blocks(arguments: DecodeArguments) -> DecodeBlocks:
    """Blocks as large as the limits of the chip allow, whole lanes of 128 rows."""
    num_slots, num_kv_heads, head_dim = arguments.cache_k.shape[1:]
    limits = _limits()
    row_bytes = _round_up(head_dim, _LANES) * arguments.q.dtype.itemsize
    num_rows = min(limits.key_bytes // row_bytes, limits.scores // _num_query_rows(arguments))
    # A block is whole in slots and in lanes, and never longer than the cache.
    step = _LANES // math.gcd(_LANES, num_kv_heads)
    slots = min(num_rows // num_kv_heads, num_slots) // step * step
    return DecodeBlocks(slots=max(slots, step), splits=limits.splits)


def refusal(arguments: DecodeArguments) -> str | None:
    """Why this backend does not take the case, with the way round; None: it does."""
    num_batch, num_new, _, head_dim = arguments.q.shape
    if num_new > MAX_NEW_TOKENS:
        return (
            f"q: expected at most {MAX_NEW_TOKENS} new tokens a row, got {num_new}; pass fewer at "
            "a time or use backend 'xla'"
        )
    if arguments.q.dtype == jnp.float16:
        return "q: expected bfloat16 or float32, got float16, which TPUs do not multiply; cast it"
    if head_dim not in _HEAD_DIMS:
        return (
            f"q: expected a head dim of {_HEAD_DIMS}, got {head_dim}; pad it with zeros (and give "
            "the scale) or use backend 'xla'"
        )
    blocks = choose_blocks(arguments)
    num_blocks = -(-arguments.cache_k.shape[1] // blocks.slots)
    if 4 * num_batch * num_blocks > _WORK_LIST_BYTES:
        return (
            f"cache_k: expected at most {_WORK_LIST_BYTES // 4} blocks of {blocks.slots} slots in "
            f"all rows, got {num_batch} x {num_blocks}; split the batch or use backend 'xla'"
        )
    return None


def reasons_against(arguments: DecodeArguments) -> tuple[str, ...]:
    """Why ``auto`` takes another backend: the case is refused, or its cache would be copied."""
    refused = refusal(arguments)
    if refused is not None:
        return (refused,)
    if copies_cache(arguments):
        head_dim = arguments.q.shape[3]
        return (f"the cache, of head dim {head_dim}, would be copied at each call",)
    return ()


def copies_cache(arguments: DecodeArguments) -> bool:
    """XLA pads no lanes where it can help it.

    ::

        H = 128    [B, S, K, H] as it is read here
        H = 96     [B, K, H, S] in memory, which is copied into [B, S, K, H] before the kernel
    """
    return arguments.q.shape[3] % _LANES != 0


@register_backend("swa_decode", "pallas_tpu", limits=reasons_against)
def decode_tpu(arguments: DecodeArguments) -> Float[Array, "B n N H"]:
    """Compiled for the TPU.

    Slots that no new token sees may hold NaN. In a slot that is seen, a NaN or infinity of one KV
    head reaches the others' query heads too, for they share the product with its zero weight.

    Raises:
      NotImplementedError: :func:`refusal` names a limit.
    """
    why_not = refusal(arguments)
    if why_not is not None:
        raise NotImplementedError(f"pallas_tpu: {why_not}")
    return decode_in_blocks(arguments, blocks=choose_blocks(arguments))


def decode_in_blocks(
    arguments: DecodeArguments, *, blocks: DecodeBlocks, interpret: Any = False
) -> Float[Array, "B n N H"]:
    """The kernel with the given blocks; ``interpret``: in plain JAX, on any device."""
    # Imported here: only those who run it need the TPU half of Pallas to import.
    from kernels_pallas.swa_decode.tpu_kernel import attend_to_blocks

    arguments = _at_least_a_block(arguments, blocks.slots)
    q = arguments.q
    num_batch, num_new, num_heads, head_dim = q.shape
    num_slots, num_kv_heads = arguments.cache_k.shape[1:3]
    num_blocks = -(-num_slots // blocks.slots)
    items, counts = work_list(arguments, blocks.slots)
    pad_slots = ((0, 0), (0, num_blocks * blocks.slots - num_slots))
    positions_BS = arguments.cache_positions.astype(jnp.int32)
    positions_BS = jnp.where(positions_BS < 0, NEVER, positions_BS)
    positions_BS = jnp.pad(positions_BS, pad_slots, constant_values=NEVER)

    q_rows = q.reshape(num_batch, num_new * num_heads, head_dim)
    pad_rows = ((0, 0), (0, _num_query_rows(arguments) - q_rows.shape[1]), (0, 0))
    new_positions, new_k, new_v = _new_rows(arguments)
    out, lse = attend_to_blocks(
        items=items,
        counts=counts,
        rules=jnp.pad(_row_rules(arguments), pad_rows, constant_values=-1),
        q=jnp.pad(q_rows, pad_rows),
        new_positions=new_positions,
        new_k=new_k,
        new_v=new_v,
        positions=_for_each_head(positions_BS, num_kv_heads),
        k=arguments.cache_k.reshape(num_batch, num_slots * num_kv_heads, head_dim),
        v=arguments.cache_v.reshape(num_batch, num_slots * num_kv_heads, head_dim),
        num_kv_heads=num_kv_heads,
        block_rows=blocks.slots * num_kv_heads,
        num_splits=blocks.splits,
        is_full=arguments.window is None,
        scale=arguments.scale,
        softcap=arguments.softcap,
        interpret=interpret,
    )
    return _combine(out, lse)[:, : q_rows.shape[1]].reshape(q.shape).astype(q.dtype)


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
    pad = ((0, 0), (0, 0), (0, num_blocks * block_slots - num_slots))
    seen = jnp.pad(seen_BnS, pad).reshape(num_batch, num_new, num_blocks, block_slots)
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


def _for_each_head(positions_BS: Int[Array, "B S"], num_kv_heads: int) -> Int[Array, "B 1 P"]:
    """Each slot's position once for each of its rows, in whole lanes: ``jnp.repeat``, on MXUs.

    XLA repeats along lanes element by element: for 128k slots and 8 heads 268,000 cycles on v5e,
    a quarter of what reading such a cache takes, and 40 seconds of compiling. A product with zeros
    and ones takes 15,000 (both are the compiler's estimates). It is exact on halves of 16 bits::

                       row  0 1 2 3 4 5 6 7
                 slot 0   [ 1 1 1 1 . . . . ]
        [ 7 9 ]  slot 1   [ . . . . 1 1 1 1 ]   =   [ 7 7 7 7 9 9 9 9 ]        K = 4
    """
    num_batch, num_slots = positions_BS.shape
    step = _LANES // math.gcd(_LANES, num_kv_heads)
    groups_BSs = jnp.pad(positions_BS, ((0, 0), (0, -num_slots % step))).reshape(
        num_batch, -1, step
    )
    row_of_slot = jnp.repeat(jnp.eye(step, dtype=jnp.float32), num_kv_heads, axis=1)
    high, low = (
        jnp.dot(half.astype(jnp.float32), row_of_slot, precision="highest").astype(jnp.int32)
        for half in (groups_BSs >> 16, groups_BSs & 0xFFFF)
    )
    positions = ((high << 16) | low).reshape(num_batch, 1, -1)
    return positions[:, :, : num_slots * num_kv_heads]


def _new_rows(
    arguments: DecodeArguments,
) -> tuple[Int[Array, "B 1 M"], Float[Array, "B M H"], Float[Array, "B M H"]]:
    """Positions, keys and values of the new tokens as one more block, in whole lanes.

    Without new tokens the block has nothing to see. They are only padded here: XLA would fuse more
    with the write of the cache that follows, and then copy the cache so as to write it first.
    """
    num_batch, num_new, _, head_dim = arguments.q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    if arguments.new_k is None or arguments.new_v is None:
        nothing = jnp.zeros((num_batch, _LANES, head_dim), arguments.q.dtype)
        return jnp.full((num_batch, 1, _LANES), NEVER, jnp.int32), nothing, nothing
    num_rows = num_new * num_kv_heads
    pad = ((0, 0), (0, -num_rows % _LANES), (0, 0))

    def rows(x: Array) -> Array:
        return jnp.pad(x.reshape(num_batch, num_rows, head_dim), pad)

    positions = jnp.where(arguments.q_positions < 0, NEVER, arguments.q_positions)
    positions = jnp.repeat(positions.astype(jnp.int32), num_kv_heads, axis=1)
    positions = jnp.pad(positions, pad[:2], constant_values=NEVER)[:, None]
    return positions, rows(arguments.new_k), rows(arguments.new_v)


def _combine(out: Float[Array, "X B R H"], lse: Float[Array, "X B R 1"]) -> Float[Array, "B R H"]:
    """One softmax from those of the splits; ``lse`` is in base 2, very low where nothing is seen.

    ::

        blocks of a row    [ 0 1 2 3 | 4 5 6 ]
        splits               out, lse  out, lse      out = sum of out * 2^lse / sum of 2^lse
    """
    if out.shape[0] == 1:
        return out[0]
    weights = jnp.exp2(lse - jnp.max(lse, axis=0))
    return jnp.sum(weights * out, axis=0) / jnp.sum(weights, axis=0)


def _at_least_a_block(arguments: DecodeArguments, slots: int) -> DecodeArguments:
    """A cache shorter than a block, which is less than 128 slots, is copied into one."""
    missing = slots - arguments.cache_k.shape[1]
    if missing <= 0:
        return arguments
    pad = ((0, 0), (0, missing))
    return dataclasses.replace(
        arguments,
        cache_k=jnp.pad(arguments.cache_k, (*pad, (0, 0), (0, 0))),
        cache_v=jnp.pad(arguments.cache_v, (*pad, (0, 0), (0, 0))),
        cache_positions=jnp.pad(arguments.cache_positions, pad, constant_values=-1),
    )


def _num_query_rows(arguments: DecodeArguments) -> int:
    """Query rows ``[token, head]``, up to whole tiles of 16 rows."""
    return _round_up(arguments.q.shape[1] * arguments.q.shape[2], 16)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.cache
def _limits() -> _Limits:
    """Of this process's chip."""
    return limits_of(jax.devices()[0].device_kind if jax.default_backend() == "tpu" else "")


def limits_of(device_kind: str) -> _Limits:
    """Of a kind of chip, as ``jax.Device.device_kind`` names it."""
    return _LIMITS.get(device_kind, _ONE_CORE)
