"""Pallas TPU kernels over a work list: forward, dq, and dk with dv.

A grid step is one item: one block of query rows against one block of keys, for one KV head. All G
query heads of the KV head are stacked, ``R = G * block_q`` rows, and share its keys and values::

    rows of a step    head 0: q0 q1 .. | head 1: q0 q1 .. | ...     R x block_kv scores
    grid              (KV head, item);  items of one query block follow one another:
                      first: clear the sums | add pair | add pair | last: divide, write

The mask is one ``[block_q, block_kv]`` array for all heads and is only built in the body of items
flagged masked. Positions, windows, sinks and segments come as integers per row and per key:

    q_info  [8, block_q]   0 position (-1: padding)  1 window  2 sinks  3 segment
    k_info  [8, block_kv]  0 position                1 segment

Scores are in base 2 (``scale * log2(e)`` in one factor), statistics in float32. float32 inputs ask
for the highest precision: Mosaic's default product of float32 rounds to bfloat16.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.mask import visible
from kernels_pallas.swa_prefill.tpu_tiles import LANES
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
_NN = (((1,), (0,)), ((), ()))  # x y


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelStatic:
    """What the kernels need to know while tracing; hashable."""

    scale: float
    softcap: float | None
    is_full: bool  # no window at all
    has_segments: bool
    num_groups: int
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


def _bias(static: KernelStatic, rows: Any, keys: Any) -> Array:
    """0 where the query sees the key, ``_MASK`` where not; ``rows(i)`` is row i of q_info."""
    segments = {}
    if static.has_segments:
        segments = {"q_segment": rows(Q_SEGMENT), "k_segment": keys(K_SEGMENT)}
    seen = visible(
        rows(Q_POSITION),
        keys(K_POSITION),
        window=None if static.is_full else rows(Q_WINDOW),
        num_sink_tokens=rows(Q_SINKS),
        **segments,
    )
    return jnp.where(seen, 0.0, _MASK)


def _add_mask(static: KernelStatic, s: Array, q_info_ref: Any, k_info_ref: Any) -> Array:
    """Scores ``[R, block_kv]`` with the mask of the heads' common rows."""
    info = jnp.transpose(q_info_ref[0])  # [block_q, 8]
    bias = _bias(static, lambda i: info[:, i : i + 1], lambda i: k_info_ref[0, i : i + 1, :])
    s_GQS = s.reshape(static.num_groups, *bias.shape)
    return (s_GQS + bias[None]).reshape(s.shape)


def _add_mask_transposed(static: KernelStatic, s: Array, q_info_ref: Any, k_info_ref: Any) -> Array:
    """The same for scores ``[block_kv, R]``."""
    info = jnp.transpose(k_info_ref[0])  # [block_kv, 8]
    bias = _bias(static, lambda i: q_info_ref[0, i : i + 1, :], lambda i: info[:, i : i + 1])
    return s + jnp.concatenate([bias] * static.num_groups, axis=1)


def _widen(x: Array, width: int) -> Array:
    """``[R, LANES]`` of equal lanes as ``[R, width]``; free when width is a multiple of LANES."""
    repeats = -(-width // LANES)
    if repeats > 1:
        x = jnp.concatenate([x] * repeats, axis=1)
    return x if x.shape[1] == width else x[:, :width]


def _fold(x: Array, width: int) -> Array:
    """``[R, n width]`` summed over n to ``[R, width]``."""
    return functools.reduce(
        jnp.add, (x[:, i : i + width] for i in range(0, x.shape[1], width))
    )


def _column(row: Array) -> Array:
    """``[1, R]`` as ``[R, LANES]``."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


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
    m_ref,  # [R, LANES]
    l_ref,  # [R, LANES] partial sums, or as wide as a smaller block_kv
    acc_ref,  # [R, H]
    *,
    static: KernelStatic,
):
    head_dim = acc_ref.shape[1]

    def first():
        m_ref[...] = jnp.full_like(m_ref, _LOW)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(masked: bool):
        s, _ = _scores(static, q_ref[0, 0], k_ref[0, 0])  # [R, block_kv]
        if masked:
            s = _add_mask(static, s, q_info_ref, k_info_ref)
        m_before = m_ref[...]
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))  # [R, LANES]
        p = jnp.exp2(s - _widen(m, s.shape[1]))
        keep = jnp.exp2(m_before - m)
        m_ref[...] = m
        # Sums of every LANES-th column: adding across lanes is dear, so it waits for the last item.
        l_ref[...] = keep[:, : l_ref.shape[1]] * l_ref[...] + _fold(p, l_ref.shape[1])
        v = v_ref[0, 0]
        pv = _dot(p.astype(v.dtype), v, _NN)
        acc_ref[...] = _widen(keep, head_dim) * acc_ref[...] + pv

    def last():
        l = jnp.broadcast_to(jnp.sum(l_ref[...], axis=1, keepdims=True), m_ref.shape)
        l = jnp.where(l > 0, l, 1.0)  # a padding row, which may have seen nothing
        out_ref[0, 0] = (acc_ref[...] * _widen(1.0 / l, head_dim)).astype(out_ref.dtype)
        lse = (m_ref[...] + jnp.log2(l)) * (1 / _LOG2_E)
        lse_ref[0, 0] = jnp.transpose(lse)[:1]

    _on_item(items_ref[pl.program_id(1)], first=first, add=add, last=last)


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
    lse_column_ref,  # [R, LANES]
    delta_column_ref,  # [R, LANES]
    acc_ref,  # [R, H]
    *,
    static: KernelStatic,
):
    def first():
        lse_column_ref[...] = _column(lse_ref[0, 0])
        delta_column_ref[...] = _column(delta_ref[0, 0])
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(masked: bool):
        k = k_ref[0, 0]
        s, slope = _scores(static, q_ref[0, 0], k)  # [R, block_kv]
        if masked:
            s = _add_mask(static, s, q_info_ref, k_info_ref)
        p = jnp.exp2(s - _widen(lse_column_ref[...], s.shape[1]))
        dp = _dot(do_ref[0, 0], v_ref[0, 0], _NT)
        ds = p * (dp - _widen(delta_column_ref[...], s.shape[1]))
        if slope is not None:
            ds = ds * slope
        acc_ref[...] += _dot(ds.astype(k.dtype), k, _NN)

    def last():
        dq_ref[0, 0] = (acc_ref[...] * static.scale).astype(dq_ref.dtype)

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
    """Scores are transposed, ``[block_kv, R]``: rows' numbers then lie along lanes as they come."""

    def first():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def add(masked: bool):
        q, do = q_ref[0, 0], do_ref[0, 0]
        s, slope = _scores(static, k_ref[0, 0], q)  # [block_kv, R]
        if masked:
            s = _add_mask_transposed(static, s, q_info_ref, k_info_ref)
        p = jnp.exp2(s - lse_ref[0, 0])
        dv_acc_ref[...] += _dot(p.astype(do.dtype), do, _NN)
        dp = _dot(v_ref[0, 0], do, _NT)
        ds = p * (dp - delta_ref[0, 0])
        if slope is not None:
            ds = ds * slope
        dk_acc_ref[...] += _dot(ds.astype(q.dtype), q, _NN)

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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
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
        scratch=[(rows_R, LANES), (rows_R, min(LANES, k.shape[2])), (rows_R, head_dim)],
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
        scratch=[(rows_R, LANES), (rows_R, LANES), (rows_R, head_dim)],
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
