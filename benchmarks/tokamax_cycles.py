"""Static cycles of tokamax's Splash attention (forward), where tokamax is installed.

It is no dependency of this library: `pip install tokamax` brings it in, beside JAX 0.9.2 or later.
Its grid holds the needed blocks alone, and blocks that are seen in full have a body of their own::

    init: a row      unmasked, masked: a block      end: a row

Its gradient is one kernel that leaves the sum of dq over key blocks to XLA, outside of any kernel:
it is not counted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attention_case import Case
from grid_cycles import Body, kernel_row
from splash_cycles import FORWARD_BLOCKS, Blocks, mask_function, smallest_type
from tpu_compile import CompiledKernel

FORWARD = "splash_mha_fwd_no_residuals"


def why_absent() -> str | None:
    """Why tokamax's kernel cannot be compiled here; None: it can."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel
    except Exception as error:  # its imports fail in many ways beside another JAX
        return f"{type(error).__name__}: {error}"
    del splash_attention_kernel
    return None


def candidates(
    generation: str, case: Case, given: Sequence[Blocks] | None = None
) -> list[dict[str, Any]]:
    """Settings of `lower` to choose the best of; `given`: sizes in place of the table's.

    Each with the compiler's scheduler, and with the experimental one that tokamax can ask for.
    """
    shared = {"generation": generation, "case": dataclasses.asdict(case)}
    return [
        {**shared, "blocks": {FORWARD: blocks}, "experimental_scheduler": experimental}
        for blocks in given or FORWARD_BLOCKS
        for experimental in (False, True)
    ]


def rows(kernels: Mapping[str, CompiledKernel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the kernel in a compiled program."""
    case, blocks = Case(**settings["case"]), settings["blocks"][FORWARD]
    scheduler = {"experimental_scheduler": settings["experimental_scheduler"]}
    return {FORWARD: row(kernels[FORWARD], case, blocks) | scheduler}


def row(kernel: CompiledKernel, case: Case, blocks: Blocks) -> dict[str, Any]:
    """Figures of the kernel."""
    block_q, block_kv = blocks[:2]
    needed = int(case.needed(block_q, block_kv).sum())
    full = int(case.seen_in_full(block_q, block_kv).sum())
    rows = -(-case.tokens // block_q) * case.heads
    bodies = (
        Body(name="init", times=rows),
        Body(name="unmasked", times=full * case.heads, products=True),
        Body(name="masked", times=(needed - full) * case.heads, products=True),
        Body(name="end", times=rows),
    )
    return kernel_row(
        kernel,
        bodies,
        steps=needed * case.heads,
        visited_pairs=needed * block_q * block_kv * case.heads,
    ) | {"blocks": list(blocks)}


def lower(settings: Mapping[str, Any], sharding: Any) -> Any:
    """The program of a case; runs in the process that loads libtpu."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        base,
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    case = Case(**settings["case"])
    block_q, block_kv, compute = settings["blocks"][FORWARD]
    needed, full = (f(block_q, block_kv) for f in (case.needed, case.seen_in_full))
    rows, columns = np.nonzero(needed)
    info = splash_attention_mask_info.MaskInfo(
        mask_next=None,
        active_rows=smallest_type(rows),
        active_cols=smallest_type(columns),
        block_mask=smallest_type(np.where(full, 2, 1)[needed]),
        num_active_blocks=jnp.asarray([len(rows)], np.int32),
        partial_mask_blocks=None,
        q_sequence=jnp.arange(case.tokens, dtype=np.int32),
    )
    kernel = splash_attention_kernel.SplashAttentionKernel(
        info,
        None,
        config=splash_attention_kernel.SplashConfig(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            use_experimental_scheduler=settings["experimental_scheduler"],
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=base.DEFAULT_MASK_VALUE,
        mask_function=mask_function(case),
        fwd_mask_sparsity=float(needed.mean()),
        dkv_mask_sparsity=1.0,
    )
    q, k = (
        jax.ShapeDtypeStruct((heads, case.tokens, case.head_dim), jnp.bfloat16, sharding=sharding)
        for heads in (case.heads, case.kv_heads)
    )
    return jax.jit(lambda q, k, v: kernel(q, k, v)).lower(q, k, k)
