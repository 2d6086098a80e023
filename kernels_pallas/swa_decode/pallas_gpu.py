"""The ``pallas_gpu`` backend: kernels for Hopper GPUs, through Pallas's Mosaic GPU.

One kernel reads rows or pages of a cache where they lie, and the new tokens' own keys after them;
another joins what its units give. What a slot holds is told by its position alone, which the kernel
looks at itself, so that little is left to do around it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels_pallas.layout import pad_end
from kernels_pallas.mosaic_gpu import hopper_limits
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode import pallas_gpu_kernels as kernels
from kernels_pallas.swa_decode import pallas_triton
from kernels_pallas.swa_decode.arguments import NEVER, DecodeArguments

_LEAST_PIECE = 8
"""Slots of a page are a multiple of it: rows over which shared memory is swizzled."""

_UNITS_AT_ONCE = 264
"""Two for each multiprocessor of an H100 or H200."""

_LEAST_UNITS = 4
"""Units of each row and KV head, of which there may be many: rows differ in what they hold."""

_MOST_UNITS = 66
"""What is joined at once, in registers."""


def limits(arguments: DecodeArguments) -> tuple[str, ...]:
    """What the kernel cannot compute, or not here."""
    found = hopper_limits("q", arguments.q.dtype, target=arguments.target)
    _, num_new, num_heads, head_dim = arguments.q.shape
    if head_dim > 256 or head_dim % 8:
        found.append(f"q: expected a head dim of at most 256, a multiple of 8, got {head_dim}")
    num_rows = num_new * (num_heads // arguments.cache_k.shape[2])
    if num_rows > kernels.MAX_ROWS:
        found.append(
            f"q: expected at most {kernels.MAX_ROWS} new tokens times query heads of a KV head, "
            f"got {num_rows}"
        )
    if arguments.page_table is not None and arguments.cache_k.shape[1] % _LEAST_PIECE:
        found.append(
            f"cache_k: expected pages of a multiple of {_LEAST_PIECE} slots, got "
            f"{arguments.cache_k.shape[1]}"
        )
    if not float(arguments.scale) > 0:
        found.append(f"scale: expected above 0, got {arguments.scale}")
    return tuple(found)


def drawbacks(arguments: DecodeArguments) -> tuple[str, ...]:
    """Why ``pallas_triton`` is the better, where it can compute the arguments.

    On an H200 it is so with rings and with rows that hold little of their slots, not with several
    new tokens after a long row (`benchmarks/decode_gpu.py` measures both).
    """
    if pallas_triton.limits(arguments):
        return ()
    return ("pallas_triton is faster with rings, and with rows that hold little",)


def choose_tiles(arguments: DecodeArguments) -> kernels.Tiles:
    """As many units as run at once, more where there are many rows; and what fits shared memory
    twice, but for many rows of heads above 128.
    """
    num_batch, num_new, num_heads, head_dim = arguments.q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    units = max(_LEAST_UNITS, _UNITS_AT_ONCE // (num_batch * num_kv_heads))
    num_blocks = _num_blocks(arguments) + (arguments.new_k is not None)
    units = min(units, num_blocks, _MOST_UNITS)
    if head_dim <= 64:
        return kernels.Tiles(units=units, num_buffers=6)
    if head_dim <= 128 and num_new * num_heads // num_kv_heads > 40:
        return kernels.Tiles(units=units, step_slots=64, num_buffers=5)
    return kernels.Tiles(units=units, step_slots=128 if head_dim <= 128 else 64, num_buffers=3)


def compute(arguments: DecodeArguments) -> AttentionOutput:
    """Compiled for the GPU. Slots that no new token sees may hold NaN."""
    return decode_in_units(arguments, tiles=choose_tiles(arguments))


def decode_in_units(
    arguments: DecodeArguments, *, tiles: kernels.Tiles, interpret: object = False
) -> AttentionOutput:
    """The kernels with these tiles; ``interpret``: an ``InterpretGPUParams``, to run them without
    a GPU.
    """
    num_batch, num_new, num_heads, head_dim = arguments.q.shape
    num_kv_heads, is_paged = arguments.cache_k.shape[2], arguments.page_table is not None
    groups = num_heads // num_kv_heads
    static = kernels.Static(
        tiles=tiles,
        num_new=num_new,
        num_groups=groups,
        num_blocks=_num_blocks(arguments),
        page_slots=arguments.cache_k.shape[1] if is_paged else None,
        is_full=arguments.window is None,
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        interpret=interpret,
    )
    q = arguments.q.reshape(num_batch, num_new, num_kv_heads, groups, head_dim)
    q = q.transpose(0, 2, 1, 3, 4).reshape(num_batch, num_kv_heads, num_new * groups, head_dim)
    q = pad_end(pad_end(q, -q.shape[2] % 8, axis=2), -head_dim % kernels.COLUMNS, axis=3)
    table = arguments.page_table
    parts, lse = kernels.attend(
        static,
        q,
        pad_end(arguments.row_rules(), kernels.MAX_ROWS - num_new * groups, axis=2, value=-1),
        _positions(arguments),
        jnp.zeros((num_batch, 1), jnp.int32) if table is None else table.astype(jnp.int32),
        (arguments.cache_k, arguments.cache_v),
        tuple(x for x in (arguments.new_k, arguments.new_v) if x is not None),
    )
    out = kernels.join(static, arguments.q.dtype, parts, lse)[..., :head_dim]
    lse = jax.nn.logsumexp(lse[..., : num_new * groups] * math.log(2), axis=2)  # [B, K, n * G]
    lse = lse.reshape(num_batch, num_kv_heads, num_new, groups).swapaxes(1, 2)
    return AttentionOutput(out=out, lse=lse.reshape(num_batch, num_new, num_heads))


def _num_blocks(arguments: DecodeArguments) -> int:
    """Blocks of cached slots."""
    return -(-arguments.num_slots // kernels.BLOCK)


def _positions(arguments: DecodeArguments) -> Int[Array, "B S"]:
    """Positions of cached slots, then of the new tokens, each filled up to whole blocks."""
    found = [arguments.cache_positions]
    if arguments.new_k is not None:
        found.append(arguments.q_positions)
    found = [pad_end(x, -x.shape[1] % kernels.BLOCK, axis=1, value=-1) for x in found]
    positions = jnp.concatenate(found, axis=1).astype(jnp.int32)
    return jnp.where(positions >= 0, positions, NEVER)
