"""Pallas TPU kernels over a work list: what they share, and the forward one.

An item is one block of query rows against one block of keys, for a few KV heads (``heads``). All
G query heads of a KV head are stacked, ``R = G * block_q`` rows, and share its keys and values.
Scores are held transposed, keys down and rows along lanes::

    s^T                head 0: q0 q1 .. | head 1: q0 q1 .. | ...     [block_kv, R]
                  k0                    |                  |
                  k1    chunk 0         |    chunk 1       |

so that a row's statistics are one number a lane, maxima and sums run down the keys (across lanes
they are dear), and nothing is kept 128-fold.

A grid step begins an item and finishes the one before it; what is between them waits in scratch::

    step                 0         1         2         3
    begin  (products)    item 0    item 1    item 2    -         scores to scratch
    finish (softmax)     -         item 0    item 1    item 2    scores from scratch

The two halves do not depend on one another, so the matrix units work on the one while the vector
units work on the other. Both walk the same chunks of rows: a chunk's scores are read, then
overwritten, at addresses that the compiler knows. So blocks of inputs are those of the step's item,
blocks of outputs those of the item before, and the few inputs that the second half needs as well
are copied to scratch.

    grid   (KV heads, item); items of one query block follow one another:
           first: forget the sums | add pair | add pair | last: divide, transpose, write

The mask is one ``[block_kv, block_q]`` array for all heads and is only built in the body of items
flagged masked. Positions, windows, sinks and segments come as integers per row; keys are counted,
and have integers of their own only where there are segments:

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

from kernels_pallas.layout import precision_of
from kernels_pallas.mask import visible
from kernels_pallas.swa_prefill.work_list import (
    FIRST,
    LAST,
    MASKED,
    WorkList,
    major_of,
    minor_of,
)

Q_POSITION, Q_WINDOW, Q_SINKS, Q_SEGMENT = range(4)
K_POSITION, K_SEGMENT = range(2)

_LOG2_E = math.log2(math.e)
# A masked score, and the lowest running maximum. exp2(_MASK - _LOW) is 0, so a row that has seen
# nothing yet sums to 0, and sums under the maximum _MASK are forgotten. Both are finite: inf - inf
# would be NaN.
_MASK = float(np.finfo(np.float32).min)
_LOW = _MASK / 2

NT = (((1,), (1,)), ((), ()))  # x y^T
NN = (((1,), (0,)), ((), ()))  # x y


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelStatic:
    """What the kernels need to know while tracing; hashable."""

    scale: float
    softcap: float | None
    is_full: bool  # no window at all
    has_segments: bool
    heads: int  # KV heads of a step
    chunk: int  # rows worked on at a time
    num_kv_blocks: int  # of a batch row
    most_items: int  # static length of the work list
    vmem_limit_bytes: int | None
    interpret: Any  # bool or pltpu.InterpretParams


def dot(x: Array, y: Array, dimensions: Any) -> Array:
    """The product, summed in float32."""
    return lax.dot_general(
        x, y, dimensions, precision=precision_of(x), preferred_element_type=jnp.float32
    )


def scores(static: KernelStatic, x: Array, y: Array) -> tuple[Array, Array | None]:
    """``x y^T`` scaled and capped, in base 2, and the cap's derivative."""
    s = dot(x, y, NT)
    if static.softcap is None:
        return s * (static.scale * _LOG2_E), None
    capped = jnp.tanh(s * (static.scale / static.softcap))
    return capped * (static.softcap * _LOG2_E), 1.0 - capped * capped


def write_mask(
    static: KernelStatic, column: Any, q_info_ref: Any, k_info_ref: Any, mask_ref: Any
) -> None:
    """``mask_ref [block_kv, block_q]``: ``_MASK`` where the query does not see the key, else 0."""
    block_kv = mask_ref.shape[0]
    if k_info_ref is None:
        begin = lax.rem(column, static.num_kv_blocks) * block_kv
        k_pos, k_segment = begin + lax.broadcasted_iota(jnp.int32, (block_kv, 1), 0), None
    else:
        columns = jnp.transpose(k_info_ref[0])  # [block_kv, 8]
        k_pos = columns[:, K_POSITION : K_POSITION + 1]
        k_segment = columns[:, K_SEGMENT : K_SEGMENT + 1]

    def rows(i: int) -> Array:
        return q_info_ref[0, i : i + 1]

    seen = visible(
        rows(Q_POSITION),
        k_pos,
        window=None if static.is_full else rows(Q_WINDOW),
        num_sink_tokens=rows(Q_SINKS),
        q_segment=None if k_segment is None else rows(Q_SEGMENT),
        k_segment=k_segment,
    )
    mask_ref[...] = jnp.where(seen, 0.0, _MASK)


def add_mask(s: Array, mask_ref: Any, first_row: int) -> Array:
    """Scores of a chunk, some rows of one head or whole heads: those share one mask."""
    width = min(s.shape[1], mask_ref.shape[1])
    begin = first_row % mask_ref.shape[1]
    mask = mask_ref[:, begin : begin + width]
    return s + jnp.concatenate([mask] * (s.shape[1] // width), axis=1)


def chunks(shape: tuple[int, ...], block_q: int, chunk: int) -> list[tuple[int, slice]]:
    """KV head and rows of each chunk of ``[heads, R, H]``: whole heads, or equal parts of one."""
    num_heads, num_rows, _ = shape
    size = block_q
    if chunk >= block_q:
        size = chunk // block_q * block_q
    elif block_q % chunk == 0:
        size = chunk
    rows = [slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size)]
    return [(head, at) for head in range(num_heads) for at in rows]


def items_of_step(items_ref: Any) -> tuple[Any, Any]:
    """The item that the step finishes, and the one that it begins."""
    step = pl.program_id(1)
    return items_ref[step], items_ref[step + 1]


def on_step(
    items_ref: Any,
    *,
    start: Callable[[], None],
    first: Callable[[], None] | None = None,
    work: Callable[[bool], None],
    last: Callable[[], None],
) -> None:
    """Run the bodies that a step's item and the one before it ask for.

    Args:
      items_ref: the list; an item that flags nothing stands at each of its ends.
      start: at the first step of a head.
      first: before the first item of a block is finished.
      work: ``work(masked)`` finishes the item before and begins the step's, masked or not.
      last: after the last item of a block is finished.
    """
    before, item = items_of_step(items_ref)
    pl.when(pl.program_id(1) == 0)(start)
    if first is not None:
        pl.when((before & FIRST) != 0)(first)
    pl.when((item & MASKED) != 0)(functools.partial(work, True))
    pl.when((item & MASKED) == 0)(functools.partial(work, False))
    pl.when((before & LAST) != 0)(last)


def clear(*refs: Any) -> None:
    """Zeros in all of them."""
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _forward_kernel(
    # prefetched
    items_ref,  # [M + 2]
    # in, of the step's item
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv], or None
    q_ref,  # [1, heads, R, H]
    kv_ref,  # [1, heads, 2, block_kv, H]
    # out, of the item before
    out_ref,  # [1, heads, R, H]
    lse_ref,  # [1, heads, 1, R]
    # scratch
    mask_ref,  # [block_kv, block_q] of the step's item
    # scratch, of the item before
    v_ref,  # [heads, H, block_kv]
    s_ref,  # [heads, block_kv, R] scores
    top_ref,  # [heads, 1, R] their maxima
    # scratch, of its query block
    m_ref,  # [heads, 1, R] running maxima
    l_ref,  # [heads, 1, R] running sums
    acc_ref,  # [heads, H, R]
    *,
    static: KernelStatic,
    column_of: Callable[[Any], Any],
):
    before, item = items_of_step(items_ref)
    before_is_first = (before & FIRST) != 0

    def finish(head: int, at: slice) -> None:
        v = v_ref[head]
        # A new block forgets the sums of the one before: exp2(_MASK - m) is 0.
        m_before = jnp.where(before_is_first, _MASK, m_ref[head, :, at])
        m = jnp.maximum(jnp.maximum(m_before, top_ref[head, :, at]), _LOW)  # [1, chunk]
        p = jnp.exp2(s_ref[head, :, at] - m)
        keep = jnp.exp2(m_before - m)
        m_ref[head, :, at] = m
        l_ref[head, :, at] = keep * l_ref[head, :, at] + jnp.sum(p, axis=0, keepdims=True)
        acc_ref[head, :, at] = keep * acc_ref[head, :, at] + dot(v, p.astype(v.dtype), NN)

    def work(masked: bool) -> None:
        if masked:
            write_mask(static, column_of(item), q_info_ref, k_info_ref, mask_ref)
        for head, at in chunks(q_ref.shape[1:], q_info_ref.shape[2], static.chunk):
            s, _ = scores(static, kv_ref[0, head, 0], q_ref[0, head, at])  # [block_kv, chunk]
            if masked:
                s = add_mask(s, mask_ref, at.start)
            finish(head, at)
            s_ref[head, :, at] = s
            top_ref[head, :, at] = jnp.max(s, axis=0, keepdims=True)
        for head in range(q_ref.shape[1]):
            v_ref[head] = jnp.transpose(kv_ref[0, head, 1])

    def last() -> None:
        for head in range(q_ref.shape[1]):
            l = l_ref[head]
            l = jnp.where(l > 0, l, 1.0)  # a padding row, which may have seen nothing
            out_ref[0, head] = jnp.transpose(acc_ref[head] * (1.0 / l)).astype(out_ref.dtype)
            lse_ref[0, head] = (m_ref[head] + jnp.log2(l)) * (1 / _LOG2_E)

    start = functools.partial(clear, v_ref, s_ref, top_ref, m_ref, l_ref, acc_ref)
    on_step(items_ref, start=start, work=work, last=last)


def call_over_list(
    kernel: Any,
    static: KernelStatic,
    work: WorkList,
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    scratch: dict[str, tuple[tuple[int, int], Any]],
    by_key: bool,
    name: str,
) -> tuple[Array, ...]:
    """Run a kernel over a list.

    Args:
      kernel: takes a reference ``x_ref`` for each name ``x`` below, None for an absent input.
      static: constants.
      work: by key block where ``by_key`` is true, else by query block.
      inputs: arrays of blocks; the first dimension numbers query blocks or key blocks.
      outputs: the same.
      scratch: shapes and dtypes, for one KV head; a mask comes before them.
      by_key: what the list is ordered by.
      name: of the kernel, in profiles.
    """
    given = {array: x for array, x in inputs.items() if x is not None}
    (num_rows, num_kv_heads), num_columns = given["q"].shape[:2], given["kv"].shape[0]
    heads, q_block, kv_block = static.heads, given["q_info"].shape[2], given["kv"].shape[3]
    num_minor = num_rows if by_key else num_columns
    major = functools.partial(major_of, num_minor_blocks=num_minor)
    minor = functools.partial(minor_of, num_minor_blocks=num_minor)
    row_of, column_of = (minor, major) if by_key else (major, minor)

    def spec(array: str, shape: tuple[int, ...], lag: int) -> pl.BlockSpec:
        """One block of the array, for one head if it has heads; an output's comes a step late."""
        number = column_of if array in ("k_info", "kv", "dkv") else row_of
        if array in ("q_info", "k_info"):
            return pl.BlockSpec((1, *shape[1:]), lambda h, i, items: (number(items[i + lag]), 0, 0))
        zeros = (0,) * (len(shape) - 2)
        return pl.BlockSpec(
            (1, heads, *shape[2:]), lambda h, i, items: (number(items[i + lag]), h, *zeros)
        )

    absent = {f"{array}_ref": None for array in inputs if array not in given}
    names = [f"{array}_ref" for array in (*given, *outputs, "mask", *scratch)]

    def body(items_ref: Any, *refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        kernel(items_ref, **named, **absent, static=static, column_of=column_of)

    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_kv_heads // heads, work.count + 1),
            in_specs=[spec(array, x.shape, 1) for array, x in given.items()],
            out_specs=[spec(array, x.shape, 0) for array, x in outputs.items()],
            scratch_shapes=[
                pltpu.VMEM((kv_block, q_block), jnp.float32),
                *(pltpu.VMEM((heads, *shape), dtype) for shape, dtype in scratch.values()),
            ],
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem_limit_bytes,
        ),
        interpret=static.interpret,
        name=name,
    )
    return tuple(call(work.items, *given.values()))


def forward(
    static: KernelStatic, q: Array, kv: Array, q_info: Array, k_info: Array | None, work: WorkList
) -> tuple[Array, Array]:
    """Output ``[rows, K, R, H]`` and natural log-sum-exp ``[rows, K, 1, R]`` (float32).

    Args:
      static: constants.
      q: ``[rows, K, R, H]``, a query block an entry.
      kv: ``[columns, K, 2, block_kv, H]``, keys and values of a key block an entry.
      q_info: ``[rows, 8, block_q]``.
      k_info: ``[columns, 8, block_kv]``; None without segments.
      work: by query block; blocks that it leaves out are never written.
    """
    num_rows, num_kv_heads, rows_R, head_dim = q.shape
    block_kv, f32 = kv.shape[3], jnp.float32
    out, lse = call_over_list(
        _forward_kernel,
        static,
        work,
        {"q_info": q_info, "k_info": k_info, "q": q, "kv": kv},
        {
            "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "lse": jax.ShapeDtypeStruct((num_rows, num_kv_heads, 1, rows_R), f32),
        },
        scratch={
            "v": ((head_dim, block_kv), kv.dtype),
            "s": ((block_kv, rows_R), f32),
            "top": ((1, rows_R), f32),
            "m": ((1, rows_R), f32),
            "l": ((1, rows_R), f32),
            "acc": ((head_dim, rows_R), f32),
        },
        by_key=False,
        name="swa_prefill_forward",
    )
    return out, lse
