"""The ``pallas_triton`` backend: a Triton kernel that reads pages or rows of a cache in place.

A row's slots are cut into units, and each has a softmax of its own, which `sums.joined` joins with
the others' and with that of the new tokens. A program is one unit of one KV head::

    row 0   [ page 7  page 2 | page 9    -   |   -      -  ]     table   7 2 9 - - -
    blocks    .  .  x  x       x  .  .  .        .  .            bounds  (2, 4) (0, 1) (0, 0)
              '- unit 0 ----'  '- unit 1 --'  '- unit 2 -'

It reads from the first block that one of its query heads sees to the last one, so that work follows
what rows hold and see, however long they might be.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import LOWEST, next_power_of_two, pad_end
from kernels_pallas.mask import visible
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_decode.sums import Sums, joined
from kernels_pallas.swa_decode.xla import attend_apart, by_kv_head, products_on
from kernels_pallas.triton import triton as plgpu
from kernels_pallas.triton import triton_limits

_LEAST_ROWS = 16
"""Of a product's left side, and slots of a block at least."""

_PROGRAMS = 4096
"""Programs from which on units are made larger rather than more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
        block_slots: slots that are read at a time, a power of two; pages are whole blocks.
        unit_blocks: blocks of a program.
        num_warps, num_stages: of Triton: warps of a program, and blocks that are on their way.
    """

    block_slots: int
    unit_blocks: int
    num_warps: int = 4
    num_stages: int = 3


def limits(arguments: DecodeArguments) -> tuple[str, ...]:
    """What the kernel cannot compute."""
    found, head_dim = triton_limits(arguments.q.dtype), arguments.q.shape[3]
    if head_dim < 16 or head_dim > 256 or head_dim & (head_dim - 1):
        found.append(f"q: expected a head dim of 16, 32, 64, 128 or 256, got {head_dim}")
    if arguments.page_table is not None and arguments.cache_k.shape[1] % _LEAST_ROWS:
        found.append(
            f"cache_k: expected pages of a multiple of {_LEAST_ROWS} slots, got "
            f"{arguments.cache_k.shape[1]}"
        )
    return tuple(found)


def choose_tiles(arguments: DecodeArguments) -> Tiles:
    """Blocks of up to 64 slots, and units of 4 blocks or as many as keep programs few."""
    block = 64
    if arguments.page_table is not None:
        block = min(block, math.gcd(block, arguments.cache_k.shape[1]))
    num_batch, num_kv_heads = arguments.q.shape[0], arguments.cache_k.shape[2]
    units = max(1, _PROGRAMS // (num_batch * num_kv_heads))
    num_blocks = -(-arguments.num_slots // block)
    return Tiles(block_slots=block, unit_blocks=min(max(4, -(-num_blocks // units)), num_blocks))


def compute(arguments: DecodeArguments) -> AttentionOutput:
    """Compiled for the GPU. Slots that no new token sees may hold NaN."""
    return decode_in_units(arguments, tiles=choose_tiles(arguments))


def decode_in_units(
    arguments: DecodeArguments, *, tiles: Tiles, interpret: bool = False
) -> AttentionOutput:
    """The kernel with these tiles; ``interpret``: in plain JAX, on any device."""
    q_BnKGH = by_kv_head(arguments)
    parts = _attend_to_cache(arguments, q_BnKGH, tiles=tiles, interpret=interpret)
    if arguments.new_k is not None and arguments.new_v is not None:
        mask = arguments.mask(arguments.q_positions)
        products = products_on(q_BnKGH.shape[1], platform="gpu")
        new = attend_apart(
            arguments, q_BnKGH, arguments.new_k, arguments.new_v, mask, products=products
        )
        parts = jax.tree.map(lambda x, one: jnp.concatenate([x, one[None]]), parts, new)
    return joined(parts, arguments.q.dtype)


def _attend_to_cache(
    arguments: DecodeArguments,
    q_BnKGH: Float[Array, "B n K G H"],
    *,
    tiles: Tiles,
    interpret: bool,
) -> Sums:
    """Sums over each unit of each row; units come first."""
    num_batch, num_new, num_kv_heads, num_groups, head_dim = q_BnKGH.shape
    num_rows = num_new * num_groups
    missing_rows = max(_LEAST_ROWS, next_power_of_two(num_rows)) - num_rows
    unit_slots = tiles.block_slots * tiles.unit_blocks
    num_units = -(-arguments.num_slots // unit_slots)
    missing_slots = num_units * unit_slots - arguments.num_slots
    positions_BS = arguments.cache_positions.astype(jnp.int32)
    q_BKRH = q_BnKGH.transpose(0, 2, 1, 3, 4).reshape(num_batch, num_kv_heads, num_rows, head_dim)
    # What programs write has rows to spare, so that each may write whole tiles, the last one too.
    written = num_kv_heads * num_rows + missing_rows
    shape = (num_batch, num_units, written)
    kernel = functools.partial(
        _attend_to_unit,
        tiles=tiles,
        num_rows=num_rows,
        num_slots=arguments.num_slots,
        has_pages=arguments.page_table is not None,
        is_full=arguments.window is None,
        scale=float(arguments.scale),
        softcap=arguments.softcap,
    )
    table = arguments.page_table
    if table is None:
        table = jnp.arange(num_batch, dtype=jnp.int32)[:, None]
    largest, total, out = pl.pallas_call(
        kernel,
        grid=(num_kv_heads, num_units, num_batch),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="swa_decode",
    )(
        table.astype(jnp.int32),
        _bounds(arguments, tiles, num_units),
        pad_end(arguments.row_rules(), missing_rows, axis=2, value=-1),
        pad_end(positions_BS, missing_slots, axis=1, value=-1),
        pad_end(q_BKRH, missing_rows, axis=2),
        arguments.cache_k,
        arguments.cache_v,
    )

    def by_query(x: Array) -> Array:
        """[U, B, n, K, G, ...] of what was written."""
        x = x[:, :, : num_kv_heads * num_rows]
        x = x.reshape(num_batch, num_units, num_kv_heads, num_new, num_groups, *x.shape[3:])
        return jnp.moveaxis(jnp.swapaxes(x, 0, 1), 3, 2)

    def per_query(x: Array) -> Array:
        return jnp.moveaxis(by_query(x), 2, -1)

    return Sums(
        largest_BKGn=per_query(largest), total_BKGn=per_query(total), out_BnKGH=by_query(out)
    )


def _bounds(arguments: DecodeArguments, tiles: Tiles, num_units: int) -> Int[Array, "B U 2"]:
    """Of each unit, the first block that is seen and the first behind all that are."""
    seen_BS = jnp.any(arguments.mask(arguments.cache_positions), axis=1)
    size = num_units * tiles.unit_blocks * tiles.block_slots
    seen_BS = pad_end(seen_BS, size - seen_BS.shape[1], axis=1)
    seen = jnp.any(seen_BS.reshape(-1, num_units, tiles.unit_blocks, tiles.block_slots), axis=3)
    number = jnp.arange(tiles.unit_blocks, dtype=jnp.int32)
    end = jnp.max(jnp.where(seen, number + 1, 0), axis=2)
    first = jnp.min(jnp.where(seen, number, tiles.unit_blocks), axis=2)
    return jnp.stack([jnp.minimum(first, end), end], axis=-1)


def _attend_to_unit(
    # in
    table_ref: Any,  # [B, M], or [B, 1] row numbers
    bounds_ref: Any,  # [B, U, 2]
    rules_ref: Any,  # [B, 3, R]
    positions_ref: Any,  # [B, S]
    q_ref: Any,  # [B, K, R, H]
    k_ref: Any,  # [P, page, K, H], or [B, S, K, H]
    v_ref: Any,
    # out
    largest_ref: Any,  # [B, U, K * rows + some]
    total_ref: Any,
    out_ref: Any,  # [B, U, K * rows + some, H]
    *,
    tiles: Tiles,
    num_rows: int,
    num_slots: int,
    has_pages: bool,
    is_full: bool,
    scale: float,
    softcap: float | None,
) -> None:
    head, unit, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block, page_slots = tiles.block_slots, k_ref.shape[1]
    q_RH = q_ref[row, head]
    q_pos, window, sinks = (rules_ref[row, rule][:, None] for rule in range(3))
    first_slot = unit * tiles.unit_blocks * block

    def add_block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest_R, total_R, out_RH = sums
        start = first_slot + number * block
        if has_pages:
            page, at = table_ref[row, start // page_slots], start % page_slots
            there = None
        else:
            page, at = row, start
            there = (start + jnp.arange(block) < num_slots)[:, None]
        here = (page, pl.ds(at, block), head)
        k_sH = plgpu.load(k_ref.at[here], mask=there, other=None if there is None else 0)
        k_pos = positions_ref[row, pl.ds(start, block)]
        seen_Rs = visible(
            q_pos, k_pos[None], window=None if is_full else window, num_sink_tokens=sinks
        )
        seen_Rs &= (k_pos >= 0)[None]
        scores_Rs = scale * plgpu.dot(q_RH, k_sH, trans_b=True).astype(jnp.float32)
        if softcap is not None:
            scores_Rs = softcap * jnp.tanh(scores_Rs / softcap)
        scores_Rs = jnp.where(seen_Rs, scores_Rs, -jnp.inf)
        new_largest_R = jnp.maximum(largest_R, jnp.max(scores_Rs, axis=1))
        weights_Rs = jnp.exp(scores_Rs - new_largest_R[:, None])
        shrunk_R = jnp.exp(largest_R - new_largest_R)
        v_sH = plgpu.load(v_ref.at[here], mask=there, other=None if there is None else 0)
        v_sH = jnp.where((jnp.max(seen_Rs.astype(jnp.int32), axis=0) > 0)[:, None], v_sH, 0)
        weighed_RH = plgpu.dot(weights_Rs.astype(v_sH.dtype), v_sH).astype(jnp.float32)
        return (
            new_largest_R,
            total_R * shrunk_R + jnp.sum(weights_Rs, axis=1),
            out_RH * shrunk_R[:, None] + weighed_RH,
        )

    num_padded, head_dim = q_RH.shape
    nothing = (
        jnp.full((num_padded,), LOWEST, jnp.float32),
        jnp.zeros((num_padded,), jnp.float32),
        jnp.zeros((num_padded, head_dim), jnp.float32),
    )
    largest_R, total_R, out_RH = lax.fori_loop(
        bounds_ref[row, unit, 0], bounds_ref[row, unit, 1], add_block, nothing
    )
    rows = pl.ds(head * num_rows, num_padded)
    is_real = jnp.arange(num_padded) < num_rows
    plgpu.store(largest_ref.at[row, unit, rows], largest_R, mask=is_real)
    plgpu.store(total_ref.at[row, unit, rows], total_R, mask=is_real)
    plgpu.store(out_ref.at[row, unit, rows], out_RH, mask=is_real[:, None])
