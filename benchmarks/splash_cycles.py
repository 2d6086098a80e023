"""Static cycles of JAX's Splash attention with a window and sinks, at its best block sizes.

The mask is a function that its kernels compute, for queries and keys by number. Its block tables
are made here (Splash itself takes minutes at 128k tokens), with the same shapes and types.

A grid is as wide as the longest row of the table; a step beyond a row's end computes nothing, but
is a step. Forward and dq walk (head, query block, key blocks), dkv walks (key block, head, query
blocks) and adds the heads of a group up::

    forward, dq    init: a row      run: a needed block      end: a row
    dkv            init: a key block and KV head     run     end: a key block and KV head
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attention_case import Case
from grid_cycles import Body, kernel_row
from tpu_compile import CompiledKernel

FORWARD, DQ, DKV = "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"

Blocks = tuple[int, ...]

# Query rows, keys loaded at a time, keys multiplied at a time. Left out, since they were the best
# nowhere: fewer than 512 rows, fewer than 512 keys at a time.
FORWARD_BLOCKS: tuple[Blocks, ...] = (
    (512, 512, 512),
    (1024, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 512),
)
# Query rows, keys.
DQ_BLOCKS: tuple[Blocks, ...] = (
    (512, 512),
    (1024, 512),
    (512, 1024),
    (1024, 1024),
    (256, 512),
    (512, 256),
)
# With sinks, the first block of keys is needed by every query: the grid is as wide as T, and large
# blocks keep its empty steps few.
DKV_BLOCKS: tuple[Blocks, ...] = (
    (512, 512, 512),
    (1024, 512, 512),
    (1024, 1024, 512),
    (2048, 1024, 512),
    (2048, 2048, 512),
    (4096, 1024, 512),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTable:
    """Which blocks a kernel of Splash visits.

    Attributes:
        width: of its grid, blocks of the longest row.
        rows: of its grid, for one head.
        needed: blocks that are computed, for one head.
    """

    width: int
    rows: int
    needed: int


def block_table(case: Case, block_q: int, block_kv: int, *, by_key: bool) -> BlockTable:
    """Rows are query blocks, or key blocks with `by_key`."""
    needed = case.needed(block_q, block_kv)
    per_row = needed.sum(axis=0 if by_key else 1)
    return BlockTable(width=int(per_row.max()), rows=len(per_row), needed=int(per_row.sum()))


def forward_candidates(
    generation: str, case: Case, given: Sequence[Blocks] | None = None
) -> list[dict[str, Any]]:
    """Settings of `lower` to choose the forward pass's best block sizes of.

    Args:
        generation: of `tpu_compile.GENERATIONS`.
        case: what is computed.
        given: sizes to choose from, in place of the table's.
    """
    shared = {"generation": generation, "case": dataclasses.asdict(case)}
    return [{**shared, "blocks": {FORWARD: blocks}} for blocks in given or FORWARD_BLOCKS]


def gradient_candidates(
    generation: str, case: Case, forward_blocks: Blocks, given: Sequence[Blocks] | None = None
) -> list[dict[str, Any]]:
    """Settings with the gradients' kernels; each compiles a choice for both of them."""
    shared = {"generation": generation, "case": dataclasses.asdict(case)}
    dq = [blocks[:2] for blocks in given] if given else DQ_BLOCKS
    return [
        {**shared, "blocks": {FORWARD: forward_blocks, DQ: of_dq, DKV: of_dkv}}
        for of_dq, of_dkv in zip(dq, given or DKV_BLOCKS, strict=True)
    ]


def rows(kernels: Mapping[str, CompiledKernel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of each of Splash's kernels in a compiled program."""
    found = {}
    for full_name, kernel in kernels.items():
        name = re.sub("(_no)?_residuals$", "", full_name)
        if name in settings["blocks"]:
            found[name] = row(name, kernel, Case(**settings["case"]), settings["blocks"][name])
    return found


def row(name: str, kernel: CompiledKernel, case: Case, blocks: Blocks) -> dict[str, Any]:
    """Figures of one kernel."""
    block_q, block_kv = blocks[:2]
    table = block_table(case, block_q, block_kv, by_key=name == DKV)
    rows = table.rows * (case.kv_heads if name == DKV else case.heads)
    bodies = (
        Body(name="init", times=rows),
        Body(name="run", times=table.needed * case.heads, products=True),
        Body(name="end", times=rows),
    )
    return kernel_row(
        kernel,
        bodies,
        steps=table.rows * case.heads * table.width,
        visited_pairs=table.needed * block_q * block_kv * case.heads,
    ) | {"blocks": list(blocks)}


def lower(settings: Mapping[str, Any], sharding: Any) -> Any:
    """The program of a case; runs in the process that loads libtpu."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    case, blocks = Case(**settings["case"]), settings["blocks"]
    block_q, block_kv, compute = blocks[FORWARD]
    sizes: dict[str, Any] = {
        "block_q": block_q,
        "block_kv": block_kv,
        "block_kv_compute": compute,
    }
    dq_info = dkv_info = None
    if DQ in blocks:
        sizes |= dict(zip(("block_q_dq", "block_kv_dq"), blocks[DQ], strict=True))
        names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        sizes |= dict(zip(names, blocks[DKV], strict=True))
        dq_info = mask_info(case, *blocks[DQ], by_key=False)
        dkv_info = mask_info(case, *blocks[DKV][:2], by_key=True)
    kernel = splash.SplashAttentionKernel(
        mask_info(case, block_q, block_kv, by_key=False),
        dq_info,
        dkv_info,
        block_sizes=splash.BlockSizes(**sizes),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function(case),
        interpret=False,
    )

    def gradients(q: Any, k: Any, v: Any, do: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: kernel(*qkv), q, k, v)
        return out, pull(do)

    q, k = (
        jax.ShapeDtypeStruct((heads, case.tokens, case.head_dim), jnp.bfloat16, sharding=sharding)
        for heads in (case.heads, case.kv_heads)
    )
    if DQ in blocks:
        return jax.jit(gradients).lower(q, k, k, q)
    return jax.jit(lambda q, k, v: kernel(q, k, v)).lower(q, k, k)


def mask_function(case: Case) -> Any:
    """What Splash's kernels call for a tile of query and key numbers."""
    from kernels_pallas.mask import visible

    def seen(q: Any, k: Any) -> Any:
        return visible(q, k, window=case.window, num_sink_tokens=case.sinks)

    return seen


def mask_info(case: Case, block_q: int, block_kv: int, *, by_key: bool) -> Any:
    """Splash's block tables: in each row the needed blocks' numbers, and 1 where there is one."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

    needed = case.needed(block_q, block_kv)
    rows = needed.T if by_key else needed
    width = int(rows.sum(axis=1).max())
    order = np.argsort(~rows, axis=1, kind="stable")[:, :width]
    used = np.arange(width) < rows.sum(axis=1)[:, None]
    number = np.where(used, order, 0)
    data_next, block_mask = (np.where(used, x, 0)[None] for x in (number, 1 + 0 * number))
    if by_key:
        data_next, block_mask = data_next.swapaxes(1, 2), block_mask.swapaxes(1, 2)
    return splash_attention_mask_info.MaskInfo(
        data_next=smallest_type(data_next),
        mask_next=None,
        block_mask=smallest_type(block_mask),
        partial_mask_blocks=None,
        q_sequence=jnp.arange(case.tokens, dtype=np.int32),
    )


def smallest_type(numbers: np.ndarray) -> Any:
    """As Splash keeps numbers in scalar memory."""
    import jax.numpy as jnp

    dtypes = (np.int8, np.int16, np.int32)
    return jnp.asarray(numbers, next(d for d in dtypes if numbers.max() <= np.iinfo(d).max))
