"""Pallas TPU kernels over a work list: forward, dq, and dk with dv.

A grid step is one item: one block of query rows against one block of keys, for one KV head. All G
query heads of the KV head are stacked, ``R = G * block_q`` rows, and share its keys and values.
Scores are held transposed, keys down and rows along lanes::

    s^T                head 0: q0 q1 .. | head 1: q0 q1 .. | ...     [block_kv, R]
                  k0                    |                  |
                  k1    chunk 0         |    chunk 1       |
    grid          (KV head, item); items of one query block follow one another:
                  first: clear the sums | add pair | add pair | last: divide, transpose, write

so that a row's statistics are one number a lane, maxima and sums run down the keys (across lanes
they are dear), and nothing is kept 128-fold. A step works through its rows in chunks, and asks for
the next chunk's scores before it turns to the softmax of the last: the compiler overlaps the two
only when it meets them in that order.

The mask is one ``[block_kv, block_q]`` array for all heads and is only built in the body of items
flagged masked. Positions, windows, sinks and segments come as integers per row and per key:

    q_info  [8, block_q]   0 position (-1: padding)  1 window  2 sinks  3 segment
    k_info  [8, block_kv]  0 position                1 segment

Scores are in base 2 (``scale * log2(e)`` in one factor), statistics in float32. float32 inputs ask
for the highest precision: Mosaic's default product of float32 rounds to bfloat16.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.mask import visible
from kernels_pallas.swa_prefill.work_list import (
    FIRST,
    LAST,
    MASKED,
    WorkList,
    major_of,
    minor_of,
)

INFO_ROWS = 8  # a tile of int32 has 8 sublanes
Q_POSITION, Q_WINDOW, Q_SINKS, Q_SEGMENT = range(4)
K_POSITION, K_SEGMENT = range(2)

_LOG2_E = math.log2(math.e)
# A masked score, and the running maximum before the first score: exp2(_MASK - _LOW) is 0, so a row
# that has seen nothing yet sums to 0. Both are finite: inf - inf would be NaN.
_MASK = float(np.finfo(np.float32).min)
_LOW = _MASK / 2

_NT = (((1,), (1,)), ((), ()))  # x y^T
_TN = (((0,), (0,)), ((), ()))  # x^T y
_NN = (((1,), (0,)), ((), ()))  # x y


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelStatic:
    """What the kernels need to know while tracing; hashable."""

    scale: float
    softcap: float | None
    is_full: bool  # no window at all
    has_segments: bool
    chunk: int  # rows worked on at a time
    vmem_limit_bytes: int | None
    interpret: Any  # bool or pltpu.InterpretParams


def _dot(x: Array, y: Array, dimensions: Any) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _scores(static: KernelStatic, x: Array, y: Array) -> tuple[Array, Array | None]:
    """``x y^T`` scaled and capped, in base 2; beside it the cap's derivative."""
    s = _dot(x, y, _NT)
    if static.softcap is None:
        return s * (static.scale * _LOG2_E), None
    capped = jnp.tanh(s * (static.scale / static.softcap))
    return capped * (static.softcap * _LOG2_E), 1.0 - capped * capped


def _add_mask(
    static: KernelStatic, s: Array, q_info_ref: Any, k_columns: Array, first_row: int
) -> Array:
    """Scores ``[block_kv, chunk]`` with ``_MASK`` added where the query does not see the key.

    The chunk is some rows of one head, or whole heads: those share one mask. ``k_columns`` is
    k_info transposed.
    """
    block_q = q_info_ref.shape[2]
    width = min(s.shape[1], block_q)
    begin = first_row % block_q

    def rows(i: int) -> Array:
        return q_info_ref[0, i : i + 1, begin : begin + width]

    segments = {}
    if static.has_segments:
        k_segment = k_columns[:, K_SEGMENT : K_SEGMENT + 1]
        segments = {"q_segment": rows(Q_SEGMENT), "k_segment": k_segment}
    seen = visible(
        rows(Q_POSITION),
        k_columns[:, K_POSITION : K_POSITION + 1],
        window=None if static.is_full else rows(Q_WINDOW),
        num_sink_tokens=rows(Q_SINKS),
        **segments,
    )
    bias = jnp.where(seen, 0.0, _MASK)
    return s + jnp.concatenate([bias] * (s.shape[1] // width), axis=1)


def _chunks(num_rows: int, block_q: int, chunk: int) -> list[tuple[int, int]]:
    """``(begin, size)`` of the chunks of a step's rows: whole heads, or equal parts of a head."""
    size = block_q
    if chunk >= block_q:
        size = chunk // block_q * block_q
    elif block_q % chunk == 0:
        size = chunk
    return [(begin, min(size, num_rows - begin)) for begin in range(0, num_rows, size)]


def _pipelined(
    chunks: list[tuple[int, int]], begin: Callable[..., Any], finish: Callable[..., None]
) -> None:
    """``finish(chunk, begin(chunk))`` for each chunk; each begins before the last one finishes."""
    begun = begin(*chunks[0])
    for i, chunk in enumerate(chunks):
        following = begin(*chunks[i + 1]) if i + 1 < len(chunks) else None
        finish(*chunk, begun)
        begun = following


def _on_item(item: Array, *, first: Any, add: Any, last: Any) -> None:
    """Run the bodies that the item's flags ask for; ``add(masked)`` has a body for each."""
    pl.when((item & FIRST) != 0)(first)
    pl.when((item & MASKED) != 0)(functools.partial(add, True))
    pl.when((item & MASKED) == 0)(functools.partial(add, False))
    pl.when((item & LAST) != 0)(last)


def _forward_kernel(
    # prefetched
    items_ref,  # [M]
    # in
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv]
    q_ref,  # [1, 1, R, H]
    k_ref,  # [1, 1, block_kv, H]
    v_ref,  # [1, 1, block_kv, H]
    # out
    out_ref,  # [1, 1, R, H]
    lse_ref,  # [1, 1, 1, R]
    # scratch, float32
    m_ref,  # [1, R]
    l_ref,  # [1, R]
    acc_ref,  # [H, R]
    *,
    static: KernelStatic,
):
    chunks = _chunks(q_ref.shape[2], q_info_ref.shape[2], static.chunk)

    def first():
        m_ref[...] = jnp.full_like(m_ref, _LOW)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(masked: bool):
        k, v = k_ref[0, 0], v_ref[0, 0]
        k_columns = jnp.transpose(k_info_ref[0]) if masked else None  # [block_kv, 8]

        def scores(begin: int, size: int) -> Array:
            s, _ = _scores(static, k, q_ref[0, 0, begin : begin + size])  # [block_kv, size]
            return s if k_columns is None else _add_mask(static, s, q_info_ref, k_columns, begin)

        def softmax(begin: int, size: int, s: Array) -> None:
            at = slice(begin, begin + size)
            m_before = m_ref[:, at]
            m = jnp.maximum(m_before, jnp.max(s, axis=0, keepdims=True))  # [1, size]
            p = jnp.exp2(s - m)
            keep = jnp.exp2(m_before - m)
            m_ref[:, at] = m
            l_ref[:, at] = keep * l_ref[:, at] + jnp.sum(p, axis=0, keepdims=True)
            acc_ref[:, at] = keep * acc_ref[:, at] + _dot(v, p.astype(v.dtype), _TN)

        _pipelined(chunks, scores, softmax)

    def last():
        l = l_ref[...]
        l = jnp.where(l > 0, l, 1.0)  # a padding row, which may have seen nothing
        out_ref[0, 0] = jnp.transpose(acc_ref[...] * (1.0 / l)).astype(out_ref.dtype)
        lse_ref[0, 0] = (m_ref[...] + jnp.log2(l)) * (1 / _LOG2_E)

    _on_item(items_ref[pl.program_id(1)], first=first, add=add, last=last)


def _each_chunk_of_gradients(
    static: KernelStatic,
    masked: bool,
    q_info_ref: Any,  # [1, 8, block_q]
    k_info_ref: Any,  # [1, 8, block_kv]
    q_ref: Any,  # [1, 1, R, H]
    k_ref: Any,  # [1, 1, block_kv, H]
    v_ref: Any,  # [1, 1, block_kv, H]
    do_ref: Any,  # [1, 1, R, H]
    lse_ref: Any,  # [1, 1, 1, R] in base 2
    delta_ref: Any,  # [1, 1, 1, R]
    *,
    add: Callable[[slice, Array, Array], None],
) -> None:
    """``add(rows, p, ds)`` for each chunk, ``[block_kv, chunk]`` float32; ds lacks the scale."""
    k, v = k_ref[0, 0], v_ref[0, 0]
    k_columns = jnp.transpose(k_info_ref[0]) if masked else None  # [block_kv, 8]

    def products(begin: int, size: int) -> tuple[Array, Array | None, Array]:
        at = slice(begin, begin + size)
        s, slope = _scores(static, k, q_ref[0, 0, at])
        if k_columns is not None:
            s = _add_mask(static, s, q_info_ref, k_columns, begin)
        return s, slope, _dot(v, do_ref[0, 0, at], _NT)

    def finish(begin: int, size: int, begun: tuple[Array, Array | None, Array]) -> None:
        at = slice(begin, begin + size)
        s, slope, dp = begun
        p = jnp.exp2(s - lse_ref[0, 0, :, at])
        ds = p * (dp - delta_ref[0, 0, :, at])
        add(at, p, ds if slope is None else ds * slope)

    _pipelined(_chunks(q_ref.shape[2], q_info_ref.shape[2], static.chunk), products, finish)


def _dq_kernel(
    # prefetched
    items_ref,  # [M]
    # in
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv]
    q_ref,  # [1, 1, R, H]
    k_ref,  # [1, 1, block_kv, H]
    v_ref,  # [1, 1, block_kv, H]
    do_ref,  # [1, 1, R, H]
    lse_ref,  # [1, 1, 1, R] in base 2
    delta_ref,  # [1, 1, 1, R]
    # out
    dq_ref,  # [1, 1, R, H]
    # scratch, float32
    acc_ref,  # [H, R]
    *,
    static: KernelStatic,
):
    refs = (q_info_ref, k_info_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref)

    def first():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(masked: bool):
        k = k_ref[0, 0]

        def add_chunk(at: slice, _: Array, ds: Array) -> None:
            acc_ref[:, at] += _dot(k, ds.astype(k.dtype), _TN)

        _each_chunk_of_gradients(static, masked, *refs, add=add_chunk)

    def last():
        dq_ref[0, 0] = jnp.transpose(acc_ref[...] * static.scale).astype(dq_ref.dtype)

    _on_item(items_ref[pl.program_id(1)], first=first, add=add, last=last)


def _dkv_kernel(
    # prefetched
    items_ref,  # [M] by key block
    # in
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv]
    q_ref,  # [1, 1, R, H]
    k_ref,  # [1, 1, block_kv, H]
    v_ref,  # [1, 1, block_kv, H]
    do_ref,  # [1, 1, R, H]
    lse_ref,  # [1, 1, 1, R] in base 2
    delta_ref,  # [1, 1, 1, R]
    # out
    dk_ref,  # [1, 1, block_kv, H]
    dv_ref,  # [1, 1, block_kv, H]
    # scratch, float32
    dk_acc_ref,  # [block_kv, H]
    dv_acc_ref,  # [block_kv, H]
    *,
    static: KernelStatic,
):
    refs = (q_info_ref, k_info_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref)

    def first():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def add(masked: bool):
        def add_chunk(at: slice, p: Array, ds: Array) -> None:
            q, do = q_ref[0, 0, at], do_ref[0, 0, at]
            dv_acc_ref[...] += _dot(p.astype(do.dtype), do, _NN)
            dk_acc_ref[...] += _dot(ds.astype(q.dtype), q, _NN)

        _each_chunk_of_gradients(static, masked, *refs, add=add_chunk)

    def last():
        dk_ref[0, 0] = (dk_acc_ref[...] * static.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc_ref[...].astype(dv_ref.dtype)

    _on_item(items_ref[pl.program_id(1)], first=first, add=add, last=last)


def _row_specs(block: Any, row_shape: tuple[int, int], *, block_q: int) -> dict[str, Any]:
    """Blocks of what belongs to query rows; ``block(item)`` is the query block's number."""
    num_rows, head_dim = row_shape

    def at(h, i, items):
        return block(items[i]), h, 0, 0

    return {
        "info": pl.BlockSpec((1, INFO_ROWS, block_q), lambda h, i, items: (block(items[i]), 0, 0)),
        "rows": pl.BlockSpec((1, 1, num_rows, head_dim), at),
        "statistics": pl.BlockSpec((1, 1, 1, num_rows), at),
    }


def _call(
    kernel: Any,
    static: KernelStatic,
    work: WorkList,
    inputs: tuple[Array, ...],
    *,
    in_specs: list[Any],
    out_specs: Any,
    out_shape: Any,
    scratch: list[tuple[int, int]],
    num_kv_heads: int,
    name: str,
) -> Any:
    call = pl.pallas_call(
        functools.partial(kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_kv_heads, work.count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem_limit_bytes,
        ),
        interpret=static.interpret,
        name=name,
    )
    return call(work.items, *inputs)


def _specs(q: Array, k: Array, q_info: Array, *, by_key: bool) -> tuple[dict, dict]:
    """Block specs of query rows and of keys, for a list by query block or by key block."""
    num_minor = (q if by_key else k).shape[0]
    major = functools.partial(major_of, num_minor_blocks=num_minor)
    minor = functools.partial(minor_of, num_minor_blocks=num_minor)
    of_q, of_k = (minor, major) if by_key else (major, minor)
    rows = _row_specs(of_q, (q.shape[2], q.shape[3]), block_q=q_info.shape[2])
    keys = _row_specs(of_k, (k.shape[2], k.shape[3]), block_q=k.shape[2])
    return rows, keys


def forward(
    static: KernelStatic, q: Array, k: Array, v: Array, q_info: Array, k_info: Array, work: WorkList
) -> tuple[Array, Array]:
    """Output ``[rows, K, R, H]`` and natural log-sum-exp ``[rows, K, 1, R]`` (float32).

    Args:
      static: constants.
      q: ``[rows, K, R, H]``, a query block an entry.
      k: ``[columns, K, block_kv, H]``, a key block an entry.
      v: like ``k``.
      q_info: ``[rows, 8, block_q]``.
      k_info: ``[columns, 8, block_kv]``.
      work: by query block; blocks that it leaves out are never written.
    """
    num_rows, num_kv_heads, rows_R, head_dim = q.shape
    rows, keys = _specs(q, k, q_info, by_key=False)
    return _call(
        _forward_kernel,
        static,
        work,
        (q_info, k_info, q, k, v),
        in_specs=[rows["info"], keys["info"], rows["rows"], keys["rows"], keys["rows"]],
        out_specs=(rows["rows"], rows["statistics"]),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_kv_heads, 1, rows_R), jnp.float32),
        ),
        scratch=[(1, rows_R), (1, rows_R), (head_dim, rows_R)],
        num_kv_heads=num_kv_heads,
        name="swa_prefill_forward",
    )


def backward(
    static: KernelStatic,
    q: Array,
    k: Array,
    v: Array,
    q_info: Array,
    k_info: Array,
    do: Array,
    lse2: Array,
    delta: Array,
    work: WorkList,
    work_by_key: WorkList,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the inputs' dtypes and layouts; blocks outside the lists are never written.

    Args:
      static, q, k, v, q_info, k_info, work: as in :func:`forward`.
      do: cotangent of the output, like ``q``.
      lse2: log-sum-exp in base 2, ``[rows, K, 1, R]``.
      delta: ``do . out`` less the log-sum-exp's cotangent, like ``lse2``.
      work_by_key: the same pairs by key block.
    """
    num_kv_heads, rows_R, head_dim = q.shape[1:]
    inputs = (q_info, k_info, q, k, v, do, lse2, delta)

    def in_specs(rows: dict, keys: dict) -> list[Any]:
        kv = [keys["rows"]] * 2
        of_rows = [rows["rows"], rows["statistics"], rows["statistics"]]
        return [rows["info"], keys["info"], rows["rows"], *kv, *of_rows]

    rows, keys = _specs(q, k, q_info, by_key=False)
    dq = _call(
        _dq_kernel,
        static,
        work,
        inputs,
        in_specs=in_specs(rows, keys),
        out_specs=rows["rows"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=[(head_dim, rows_R)],
        num_kv_heads=num_kv_heads,
        name="swa_prefill_dq",
    )
    rows, keys = _specs(q, k, q_info, by_key=True)
    dk, dv = _call(
        _dkv_kernel,
        static,
        work_by_key,
        inputs,
        in_specs=in_specs(rows, keys),
        out_specs=(keys["rows"], keys["rows"]),
        out_shape=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        scratch=[(k.shape[2], head_dim), (k.shape[2], head_dim)],
        num_kv_heads=num_kv_heads,
        name="swa_prefill_dkv",
    )
    return dq, dk, dv
