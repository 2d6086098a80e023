"""The ``xla`` backend: blockwise attention in plain JAX, on any device.

Forward with an online softmax, backward with weights computed anew from the log-sum-exp.

One scan step is one block of query rows of one batch row, all heads. It reads its keys in *chunks*,
a fixed number of key blocks cut as one contiguous slab, and how many it reads comes from the block
map::

    keys     |s s|. . . . . . . .|x x x x|x x x x|x .         s  sink blocks, one at a time
    chunks   [   ]               [   0   ][   1   ][   2   ]   x  window or full range, in chunks

so the trip counts are traced and the shapes are static: other full rows, lengths or segments of the
same shape never recompile, a windowed row costs O(window + sinks) and nothing bigger than a chunk's
scores is ever held. The backward pass visits the same chunks in the same order.

Arrays here are blocked: ``R = G * block_q`` rows of one KV head stacked, so that K and V are read
once for a whole group of query heads and never repeated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target, no_limits
from kernels_pallas.layout import (
    pad_end,
    precision_of,
    round_up,
    rows_from_blocks,
    rows_to_blocks,
)
from kernels_pallas.mask import BlockMap, RowInfo, block_map, per_row, visible
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.arguments import (
    SAVED,
    PrefillArguments,
    without_padding,
)

# Starting value of the running maximum. Finite, so that a chunk in which a row sees nothing gives
# exp(-inf - _LOW) = 0 and not exp(-inf + inf) = nan.
_LOW = float(np.finfo(np.float32).min) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Static sizes: rows a step, keys a block, and blocks read at once."""

    block_q: int
    block_kv: int
    chunk_blocks: int

    @property
    def chunk(self) -> int:
        """Keys read at once."""
        return self.block_kv * self.chunk_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What the loops need to know while tracing; hashable."""

    tiling: Tiling
    scale: float
    softcap: float | None
    is_full: bool  # no window at all: every row is full
    has_sinks: bool
    one_chunk: bool  # a block of rows never reads more than one chunk besides its sinks
    precision: lax.Precision | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRows:
    """Integers of one block of query rows; the scan takes them stacked on a leading axis."""

    batch: Int[Array, "*steps"]
    q_pos: Int[Array, "*steps block_q"]
    q_full: Bool[Array, "*steps block_q"] | None
    q_segment: Int[Array, "*steps block_q"] | None
    window: Int[Array, "*steps"]
    num_sink_tokens: Int[Array, "*steps"]
    blocks: BlockMap  # of the shape [*steps]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyRows:
    """Segment and position of each key, padded like the keys; both None without segments."""

    k_pos: Int[Array, "B S"] | None
    k_segment: Int[Array, "B S"] | None


limits = no_limits


def compute(
    arguments: PrefillArguments, *, tiling: Tiling | None = None, platform: str | None = None
) -> AttentionOutput:
    """Blockwise attention; the log-sum-exp is always filled in.

    Args:
      arguments: of the call.
      tiling: None: :func:`choose_tiling`.
      platform: whose casts and sizes to take; None: of the arguments' target.
    """
    platform = platform or (arguments.target or Target.here()).platform
    tiling = tiling or choose_tiling(arguments, platform=platform)
    num_queries, num_keys = arguments.shape[1:]
    rows = arguments.rows()
    windowed = arguments.window is not None
    sinks = arguments.num_sink_tokens
    reach = -(-num_keys // tiling.block_kv)
    if rows.q_full is None:
        reach = _reach(arguments, block_q=tiling.block_q, block_kv=tiling.block_kv)
    static = Static(
        tiling=tiling,
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        is_full=not windowed,
        one_chunk=reach <= tiling.chunk_blocks,
        has_sinks=windowed and not (isinstance(sinks, int) and sinks == 0),
        precision=precision_of(arguments.q),
    )
    # Up to a chunk beyond the last block may be read (and masked): leave that much room.
    k_pad = round_up(num_keys, tiling.block_kv) - num_keys + tiling.chunk
    # The CPU's low-precision products are slow, and float32 holds their inputs exactly.
    dtype = jnp.float32 if platform == "cpu" else arguments.q.dtype
    q, k, v = (x.astype(dtype) for x in without_padding(arguments, rows))
    k, v = (pad_end(x.transpose(0, 2, 1, 3), k_pad, axis=2) for x in (k, v))
    result = _compiled_attention(
        static,
        rows_to_blocks(q, tiling.block_q, num_kv_heads=k.shape[1]),
        k,
        v,
        _step_rows(arguments, rows, tiling),
        _key_rows(rows, num_keys=num_keys, k_pad=k_pad),
    )
    out, lse = cast(tuple[Array, Array], result)
    from_blocks = functools.partial(
        rows_from_blocks,
        num_groups=q.shape[2] // k.shape[1],
        num_batch=q.shape[0],
        num_queries=num_queries,
    )
    valid_BT1 = rows.q_valid[:, :, None]
    return AttentionOutput(
        out=jnp.where(valid_BT1[..., None], from_blocks(out), 0).astype(arguments.q.dtype),
        lse=jnp.where(valid_BT1, from_blocks(lse[..., None])[..., 0], -jnp.inf),
    )


def choose_tiling(arguments: PrefillArguments, *, platform: str) -> Tiling:
    """Block sizes for the platform and the window.

    A windowed block of rows reads ``window - 1 + block_q`` keys: small blocks waste little of that,
    big ones run closer to the speed of a plain matrix product. One chunk holds all of it up to
    ``most`` keys; beyond, it is cut into equal chunks. The CPU sizes are measured (2 cores,
    AVX-512, N=16, K=8, H=128), those for a GPU keep the number of launches low.
    """
    _, num_queries, num_keys = arguments.shape
    window = arguments.window if isinstance(arguments.window, int) else None
    on_cpu = platform == "cpu"
    block_kv, most = (64, 640) if on_cpu else (256, 2048)
    if on_cpu and window is not None and window <= 1024:
        block_q = 64 if window <= 128 else 128
    else:
        block_q = 256 if on_cpu else 1024
    block_q = min(block_q, round_up(num_queries, 8))
    block_kv = min(block_kv, round_up(num_keys, 8))
    blocks = _reach(arguments, block_q=block_q, block_kv=block_kv)
    num_chunks = -(-blocks * block_kv // most)
    return Tiling(block_q=block_q, block_kv=block_kv, chunk_blocks=-(-blocks // num_chunks))


def _reach(arguments: PrefillArguments, *, block_q: int, block_kv: int) -> int:
    """Most key blocks, sinks aside, that a block of rows reads if none of its rows is full."""
    blocks = -(-arguments.shape[2] // block_kv)
    if not isinstance(arguments.window, int):
        return blocks
    # One more if a block of rows may begin inside a block of keys.
    offset = arguments.q_offset
    aligned = isinstance(offset, int) and offset % block_kv == 0 and block_q % block_kv == 0
    reach = -(-(arguments.window - 1) // block_kv) + -(-block_q // block_kv)
    return min(blocks, reach + (0 if aligned else 1))


def _step_rows(arguments: PrefillArguments, rows: RowInfo, tiling: Tiling) -> StepRows:
    """What each scan step reads; batch rows one after another, blocks of one row in order."""
    num_batch, num_queries, num_keys = arguments.shape
    num_blocks = -(-num_queries // tiling.block_q)
    window = num_keys if arguments.window is None else arguments.window

    def to_steps(x_BT: Array, fill: int) -> Array:
        x_BT = pad_end(x_BT, -num_queries % tiling.block_q, axis=1, value=fill)
        return x_BT.reshape(num_batch * num_blocks, tiling.block_q)

    def per_step(value_B: Int[Array, "#B"]) -> Int[Array, " steps"]:
        return jnp.repeat(jnp.broadcast_to(value_B, (num_batch,)), num_blocks)

    blocks = block_map(
        rows,
        window=arguments.window,
        num_sink_tokens=arguments.num_sink_tokens,
        block_q=tiling.block_q,
        block_kv=tiling.block_kv,
    )
    return StepRows(
        batch=per_step(jnp.arange(num_batch, dtype=jnp.int32)),
        q_pos=to_steps(rows.q_pos, 0),
        q_full=None if rows.q_full is None else to_steps(rows.q_full, False),
        q_segment=None if rows.q_segment is None else to_steps(rows.q_segment, -1),
        window=per_step(per_row(window)),
        num_sink_tokens=per_step(per_row(arguments.num_sink_tokens)),
        blocks=jax.tree.map(jnp.ravel, blocks),
    )


def _key_rows(rows: RowInfo, *, num_keys: int, k_pad: int) -> KeyRows:
    """Positions and segments of the keys, padded with what no query row has."""
    if rows.k_start is None or rows.k_segment is None:
        return KeyRows(k_pos=None, k_segment=None)
    k_pos_BS = jnp.arange(num_keys, dtype=jnp.int32) - rows.k_start
    return KeyRows(
        k_pos=pad_end(k_pos_BS, k_pad, axis=1, value=num_keys),
        k_segment=pad_end(rows.k_segment, k_pad, axis=1, value=-2),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
    static: Static,
    q: Float[Array, "steps K R H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    steps: StepRows,
    keys: KeyRows,
) -> tuple[Float[Array, "steps K R H"], Float[Array, "steps K R"]]:
    """Output (float32) and log-sum-exp of every row.

    Inputs must be finite and ``S`` must leave a whole chunk of slack past the last block that the
    map names. Rows outside the lengths return finite values that mean nothing: the caller takes
    them away (and their cotangents with them).
    """
    return _forward(static, q, k, v, steps, keys)


def _forward(static: Static, q: Array, k: Array, v: Array, steps: StepRows, keys: KeyRows):
    def step(_: None, xs: tuple[Array, StepRows]) -> tuple[None, tuple[Array, Array]]:
        q_KRH, rows = xs
        state = (
            jnp.full(q_KRH.shape[:2], _LOW, jnp.float32),
            jnp.zeros(q_KRH.shape[:2], jnp.float32),
            jnp.zeros(q_KRH.shape, jnp.float32),
        )

        def chunk(state: tuple[Array, Array, Array], start: Array, size: int, masked: bool):
            m_KR, l_KR, acc_KRH = state
            k_KCH, v_KCH = _cut(k, rows.batch, start, size), _cut(v, rows.batch, start, size)
            s_KRC = _scores(static, q_KRH, k_KCH)
            if masked:
                s_KRC = _apply_mask(static, s_KRC, rows, keys, start, size)
            new_m_KR = jnp.maximum(m_KR, jnp.max(s_KRC, axis=-1))
            p_KRC = jnp.exp(s_KRC - new_m_KR[..., None])
            keep_KR = jnp.exp(m_KR - new_m_KR)
            pv_KRH = _dot(static, "KRC,KCH->KRH", p_KRC.astype(v.dtype), v_KCH)
            l_KR = keep_KR * l_KR + jnp.sum(p_KRC, axis=-1)
            return new_m_KR, l_KR, keep_KR[..., None] * acc_KRH + pv_KRH

        m_KR, l_KR, acc_KRH = _for_each_chunk(static, rows.blocks, chunk, state)
        l_safe_KR = jnp.where(l_KR > 0, l_KR, 1.0)
        lse_KR = jnp.where(l_KR > 0, m_KR + jnp.log(l_safe_KR), 0.0)
        return None, (acc_KRH / l_safe_KR[..., None], lse_KR)

    return lax.scan(step, None, (q, steps))[1]


def _forward_saving(static: Static, q: Array, k: Array, v: Array, steps: StepRows, keys: KeyRows):
    out, lse = checkpoint_name(_forward(static, q, k, v, steps, keys), SAVED)
    return (out, lse), (q, k, v, steps, keys, out, lse)


def _backward(static: Static, saved: tuple[Any, ...], cotangents: tuple[Array, Array]):
    """dq, dk, dv. With ``p = exp(s - lse)``: ``ds = p (do.v - delta + dlse)``, ``delta = do.o``.

    One pass over the query blocks: dq is finished within its step, dk and dv are float32 arrays of
    the keys' size into which every step adds its slabs.
    """
    q, k, v, steps, keys, out, lse = saved
    do, dlse = cotangents
    rest = dlse - jnp.sum(do * out, axis=-1)
    do = do.astype(v.dtype)

    def step(carry: tuple[Array, Array], xs: tuple[Any, ...]):
        q_KRH, do_KRH, lse_KR, rest_KR, rows = xs

        def chunk(state: tuple[Array, Array, Array], start: Array, size: int, masked: bool):
            dq_KRH, dk, dv = state
            k_KCH, v_KCH = _cut(k, rows.batch, start, size), _cut(v, rows.batch, start, size)
            s_KRC = _scores(static, q_KRH, k_KCH)
            seen_KRC = _apply_mask(static, s_KRC, rows, keys, start, size) if masked else s_KRC
            p_KRC = jnp.exp(seen_KRC - lse_KR[..., None])
            dp_KRC = _dot(static, "KRH,KCH->KRC", do_KRH, v_KCH)
            ds_KRC = p_KRC * (dp_KRC + rest_KR[..., None]) * static.scale
            if static.softcap is not None:
                ds_KRC = ds_KRC * (1.0 - jnp.square(s_KRC / static.softcap))
            p_KRC, ds_KRC = p_KRC.astype(k.dtype), ds_KRC.astype(k.dtype)
            dv = _add(dv, rows.batch, start, _dot(static, "KRC,KRH->KCH", p_KRC, do_KRH))
            dk = _add(dk, rows.batch, start, _dot(static, "KRC,KRH->KCH", ds_KRC, q_KRH))
            return dq_KRH + _dot(static, "KRC,KCH->KRH", ds_KRC, k_KCH), dk, dv

        state = (jnp.zeros(q_KRH.shape, jnp.float32), *carry)
        dq_KRH, dk, dv = _for_each_chunk(static, rows.blocks, chunk, state)
        return (dk, dv), dq_KRH.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(step, (zeros, zeros), (q, do, lse, rest, steps))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


blockwise_attention.defvjp(_forward_saving, _backward)

# Without this, every call outside jit would compile the loops anew.
_compiled_attention = jax.jit(blockwise_attention, static_argnums=0)


def _for_each_chunk(
    static: Static,
    blocks: BlockMap,
    chunk: Callable[[Any, Array, int, bool], Any],
    state: Any,
) -> Any:
    """Fold ``chunk(state, start, size, masked)`` over a query block's keys: sinks, then rest."""
    tiling = static.tiling
    if static.has_sinks:
        state = lax.fori_loop(
            blocks.sink_first,
            blocks.sink_end,
            lambda j, state: chunk(state, j * tiling.block_kv, tiling.block_kv, True),
            state,
        )

    def body(j: Array, state: Any) -> Any:
        block = blocks.first + j * tiling.chunk_blocks
        free = (block >= blocks.unmasked_first) & (
            block + tiling.chunk_blocks <= blocks.unmasked_end
        )
        start = block * tiling.block_kv
        if static.one_chunk:  # it holds the rows' own keys, so it is never free
            return chunk(state, start, tiling.chunk, True)
        return lax.cond(
            free,
            lambda state: chunk(state, start, tiling.chunk, False),
            lambda state: chunk(state, start, tiling.chunk, True),
            state,
        )

    num_chunks = -(-(blocks.end - blocks.first) // tiling.chunk_blocks)
    return lax.fori_loop(0, num_chunks, body, state)


def _dot(static: Static, spec: str, x: Array, y: Array) -> Float[Array, "..."]:
    return jnp.einsum(spec, x, y, precision=static.precision, preferred_element_type=jnp.float32)


def _scores(static: Static, q_KRH: Array, k_KCH: Array) -> Float[Array, "K R C"]:
    s_KRC = static.scale * _dot(static, "KRH,KCH->KRC", q_KRH, k_KCH)
    if static.softcap is not None:
        s_KRC = static.softcap * jnp.tanh(s_KRC / static.softcap)
    return s_KRC


def _cut(x_BKSH: Array, batch: Array, start: Array, size: int) -> Array:
    """``x_BKSH[batch, :, start : start + size]``."""
    _, num_heads, _, head_dim = x_BKSH.shape
    return lax.dynamic_slice(x_BKSH, (batch, 0, start, 0), (1, num_heads, size, head_dim))[0]


def _add(into_BKSH: Array, batch: Array, start: Array, x_KCH: Array) -> Array:
    """``into_BKSH[batch, :, start : start + C] += x_KCH``."""
    at = (batch, 0, start, 0)
    sum_1KCH = lax.dynamic_slice(into_BKSH, at, (1, *x_KCH.shape)) + x_KCH[None]
    return lax.dynamic_update_slice(into_BKSH, sum_1KCH, at)


def _apply_mask(
    static: Static, s_KRC: Array, rows: StepRows, keys: KeyRows, start: Array, size: int
) -> Float[Array, "K R C"]:
    """Scores with -inf where the row does not see the key; the mask is shared by all heads."""
    k_pos_C = start + jnp.arange(size, dtype=jnp.int32)
    segments = {}
    if keys.k_pos is not None and keys.k_segment is not None and rows.q_segment is not None:
        at = (rows.batch, start)
        k_pos_C = lax.dynamic_slice(keys.k_pos, at, (1, size))[0]
        k_segment_C = lax.dynamic_slice(keys.k_segment, at, (1, size))[0]
        segments = {"q_segment": rows.q_segment[:, None], "k_segment": k_segment_C}
    mask_QC = visible(
        rows.q_pos[:, None],
        k_pos_C,
        window=None if static.is_full else rows.window,
        num_sink_tokens=rows.num_sink_tokens,
        q_full=False if rows.q_full is None else rows.q_full[:, None],
        **segments,
    )
    num_heads, num_rows, _ = s_KRC.shape
    block_q = mask_QC.shape[0]
    s_KGQC = s_KRC.reshape(num_heads, num_rows // block_q, block_q, size)
    return jnp.where(mask_QC, s_KGQC, -jnp.inf).reshape(s_KRC.shape)
