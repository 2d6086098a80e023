"""The gradient's Pallas TPU kernels: dq over a work list by query block, dk with dv by key block.

They go as ``pallas_tpu_kernels`` says: a step begins an item and finishes the one before.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.swa_prefill.pallas_tpu_kernels import (
    NN,
    NT,
    KernelStatic,
    add_mask,
    call_over_list,
    chunks,
    clear,
    dot,
    items_of_step,
    on_step,
    scores,
    write_mask,
)
from kernels_pallas.swa_prefill.work_list import WorkList


def _gradients_of_step(
    static: KernelStatic,
    item: Any,
    refs: tuple[Any, ...],
    mask_ref: Any,
    saved: tuple[Any, Any],
    *,
    masked: bool,
    add: Callable[[int, slice, Array, Array], None],
    column_of: Callable[[Any], Any],
) -> None:
    """``add(head, rows, p, ds)`` for each chunk of the item before, then that chunk of the item.

    ``p = exp2(s - lse)`` and ``ds = p (do.v - delta)``, ``[block_kv, chunk]`` float32; ds lacks the
    scale. ``saved`` holds the exponent and the second factor from one step to the next.
    """
    q_info_ref, k_info_ref, q_ref, kv_ref, do_ref, statistics_ref = refs
    exponent_ref, slope_ref = saved
    if masked:
        write_mask(static, column_of(item), q_info_ref, k_info_ref, mask_ref)
    for head, at in chunks(q_ref.shape[1:], q_info_ref.shape[2], static.chunk):
        s, derivative = scores(static, kv_ref[0, head, 0], q_ref[0, head, at])
        if masked:
            s = add_mask(s, mask_ref, at.start)
        slope = dot(kv_ref[0, head, 1], do_ref[0, head, at], NT)
        slope -= statistics_ref[0, head, 1:2, at]
        p = jnp.exp2(exponent_ref[head, :, at])
        add(head, at, p, p * slope_ref[head, :, at])
        exponent_ref[head, :, at] = s - statistics_ref[0, head, 0:1, at]
        slope_ref[head, :, at] = slope if derivative is None else slope * derivative


def _dq_kernel(
    # prefetched
    items_ref,  # [M + 2]
    # in, of the step's item
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv], or None
    q_ref,  # [1, heads, R, H]
    kv_ref,  # [1, heads, 2, block_kv, H]
    do_ref,  # [1, heads, R, H]
    statistics_ref,  # [1, heads, 2, R] log-sum-exp in base 2, and delta
    # out, of the item before
    dq_ref,  # [1, heads, R, H]
    # scratch
    mask_ref,  # [block_kv, block_q] of the step's item
    # scratch, of the item before
    k_ref,  # [heads, H, block_kv]
    exponent_ref,  # [heads, block_kv, R]
    slope_ref,  # [heads, block_kv, R]
    # scratch, of its query block
    acc_ref,  # [heads, H, R]
    *,
    static: KernelStatic,
    column_of: Callable[[Any], Any],
):
    _, item = items_of_step(items_ref)

    def add(head: int, at: slice, _: Array, ds: Array) -> None:
        k = k_ref[head]
        acc_ref[head, :, at] += dot(k, ds.astype(k.dtype), NN)

    def work(masked: bool) -> None:
        _gradients_of_step(
            static,
            item,
            (q_info_ref, k_info_ref, q_ref, kv_ref, do_ref, statistics_ref),
            mask_ref,
            (exponent_ref, slope_ref),
            masked=masked,
            add=add,
            column_of=column_of,
        )
        for head in range(q_ref.shape[1]):
            k_ref[head] = jnp.transpose(kv_ref[0, head, 0])

    def last() -> None:
        for head in range(q_ref.shape[1]):
            dq_ref[0, head] = jnp.transpose(acc_ref[head] * static.scale).astype(dq_ref.dtype)

    start = functools.partial(clear, k_ref, exponent_ref, slope_ref, acc_ref)
    first = functools.partial(clear, acc_ref)
    on_step(items_ref, start=start, first=first, work=work, last=last)


def _dkv_kernel(
    # prefetched
    items_ref,  # [M + 2] by key block
    # in, of the step's item
    q_info_ref,  # [1, 8, block_q]
    k_info_ref,  # [1, 8, block_kv], or None
    q_ref,  # [1, heads, R, H]
    kv_ref,  # [1, heads, 2, block_kv, H]
    do_ref,  # [1, heads, R, H]
    statistics_ref,  # [1, heads, 2, R] log-sum-exp in base 2, and delta
    # out, of the item before
    dkv_ref,  # [1, heads, 2, block_kv, H]
    # scratch
    mask_ref,  # [block_kv, block_q] of the step's item
    # scratch, of the item before
    q_before_ref,  # [heads, R, H]
    do_before_ref,  # [heads, R, H]
    exponent_ref,  # [heads, block_kv, R]
    slope_ref,  # [heads, block_kv, R]
    # scratch, of its key block
    dk_ref,  # [heads, block_kv, H]
    dv_ref,  # [heads, block_kv, H]
    *,
    static: KernelStatic,
    column_of: Callable[[Any], Any],
):
    _, item = items_of_step(items_ref)

    def add(head: int, at: slice, p: Array, ds: Array) -> None:
        q, do = q_before_ref[head, at], do_before_ref[head, at]
        dv_ref[head] += dot(p.astype(do.dtype), do, NN)
        dk_ref[head] += dot(ds.astype(q.dtype), q, NN)

    def work(masked: bool) -> None:
        _gradients_of_step(
            static,
            item,
            (q_info_ref, k_info_ref, q_ref, kv_ref, do_ref, statistics_ref),
            mask_ref,
            (exponent_ref, slope_ref),
            masked=masked,
            add=add,
            column_of=column_of,
        )
        q_before_ref[...] = q_ref[0]
        do_before_ref[...] = do_ref[0]

    def last() -> None:
        dkv_ref[0, :, 0] = (dk_ref[...] * static.scale).astype(dkv_ref.dtype)
        dkv_ref[0, :, 1] = dv_ref[...].astype(dkv_ref.dtype)

    scratch = (q_before_ref, do_before_ref, exponent_ref, slope_ref, dk_ref, dv_ref)
    start = functools.partial(clear, *scratch)
    first = functools.partial(clear, dk_ref, dv_ref)
    on_step(items_ref, start=start, first=first, work=work, last=last)


def backward(
    static: KernelStatic,
    q: Array,
    kv: Array,
    q_info: Array,
    k_info: Array | None,
    do: Array,
    statistics: Array,
    work: WorkList,
    work_by_key: WorkList,
) -> tuple[Array, Array]:
    """The gradients dq, and dk with dv, in the inputs' dtypes and layouts.

    Blocks outside the lists are never written.

    Args:
      static, q, kv, q_info, k_info, work: as in ``pallas_tpu_kernels.forward``.
      do: cotangent of the output, like ``q``.
      statistics: ``[rows, K, 2, R]`` float32: the log-sum-exp in base 2, and ``do . out`` less the
        log-sum-exp's cotangent.
      work_by_key: the same pairs by key block.
    """
    rows_R, head_dim = q.shape[2:]
    block_kv, f32 = kv.shape[3], jnp.float32
    inputs = {
        "q_info": q_info,
        "k_info": k_info,
        "q": q,
        "kv": kv,
        "do": do,
        "statistics": statistics,
    }
    factors = {"exponent": ((block_kv, rows_R), f32), "slope": ((block_kv, rows_R), f32)}
    (dq,) = call_over_list(
        _dq_kernel,
        static,
        work,
        inputs,
        {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        scratch={
            "k": ((head_dim, block_kv), kv.dtype),
            **factors,
            "acc": ((head_dim, rows_R), f32),
        },
        by_key=False,
        name="swa_prefill_dq",
    )
    (dkv,) = call_over_list(
        _dkv_kernel,
        static,
        work_by_key,
        inputs,
        {"dkv": jax.ShapeDtypeStruct(kv.shape, kv.dtype)},
        scratch={
            "q_before": ((rows_R, head_dim), q.dtype),
            "do_before": ((rows_R, head_dim), do.dtype),
            **factors,
            "dk": ((block_kv, head_dim), f32),
            "dv": ((block_kv, head_dim), f32),
        },
        by_key=True,
        name="swa_prefill_dkv",
    )
    return dq, dkv
