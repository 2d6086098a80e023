"""Static cycles of this library's decode kernel, and the bytes that it reads from the cache.

One new token of one row. A full cache holds all tokens before it, a ring the sinks and the window.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from attention_case import Case
from grid_cycles import Body, kernel_row
from tpu_compile import CompiledKernel

from kernels_pallas.chips import TPUS
from kernels_pallas.swa_decode import pallas_tpu
from kernels_pallas.swa_decode.arguments import DecodeArguments

KERNEL = "swa_decode"


def settings_of(generation: str, case: Case) -> dict[str, Any]:
    """Settings of `lower`; the case's window tells a ring (its size) from a full cache (None)."""
    blocks = pallas_tpu.choose_blocks(decode_arguments(case))
    splits = TPUS[generation].cores
    return {
        "generation": generation,
        "case": dataclasses.asdict(case),
        "blocks": dataclasses.asdict(dataclasses.replace(blocks, splits=splits)),
    }


def row(kernel: CompiledKernel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the kernel for one token."""
    case, blocks = Case(**settings["case"]), pallas_tpu.DecodeBlocks(**settings["blocks"])
    items, counts = pallas_tpu.work_list(decode_arguments(case, np.zeros), blocks.slots)
    listed = np.asarray(items)[: int(counts[0])]
    free = int((listed & 1).sum())
    steps = max(-(-len(listed) // blocks.splits), 1) * blocks.splits
    bodies = (
        Body(name="start", times=blocks.splits),
        Body(name="new", times=1, products=True),
        Body(name="unmasked", times=free, products=True),
        Body(name="masked", times=len(listed) - free, products=True),
        Body(name="finish", times=blocks.splits),
    )
    slots = len(listed) * blocks.slots
    per_slot = case.kv_heads * (2 * case.head_dim * 2 + 4)  # keys and values; a position a row
    figures = kernel_row(kernel, bodies, steps=steps, visited_pairs=slots * case.heads)
    return figures | {"blocks": [blocks.slots], "hbm_bytes": slots * per_slot}


def decode_arguments(case: Case, array: Any = None) -> DecodeArguments:
    """The library's arguments for the token at position T - 1.

    Args:
        case: what is in the cache.
        array: called with a shape and a dtype for queries, keys and values; None: shapes alone.
    """
    import jax
    import jax.numpy as jnp

    make = jax.ShapeDtypeStruct if array is None else array
    positions = cache_positions(case)
    new = make((1, 1, case.kv_heads, case.head_dim), jnp.bfloat16)
    cache = make((1, len(positions), case.kv_heads, case.head_dim), jnp.bfloat16)
    return DecodeArguments(
        q=make((1, 1, case.heads, case.head_dim), jnp.bfloat16),
        cache_k=cache,
        cache_v=cache,
        q_positions=jnp.full((1, 1), case.tokens - 1, jnp.int32),
        cache_positions=jnp.asarray(positions, jnp.int32)[None],
        new_k=new,
        new_v=new,
        window=case.window,
        num_sink_tokens=case.sinks,
        q_full=None,
        scale=case.head_dim**-0.5,
        softcap=None,
    )


def cache_positions(case: Case) -> np.ndarray:
    """Positions of the slots: all, or sinks and then the window's in a ring.

    ::

        sinks 2, window 4, token 10 is new     0 1 | 8 9 6 7
    """
    if case.window is None:
        return np.arange(case.tokens)
    ring = np.arange(case.window)
    last = case.tokens - 1
    newest = last - 1 - (last - 1 - case.sinks - ring) % case.window
    return np.concatenate([np.arange(case.sinks), newest])


def lower(settings: Mapping[str, Any], sharding: Any) -> Any:
    """The program of a case; runs in the process that loads libtpu."""
    import jax

    case, blocks = Case(**settings["case"]), pallas_tpu.DecodeBlocks(**settings["blocks"])
    given = decode_arguments(case)
    names = ("q", "cache_k", "cache_v", "q_positions", "cache_positions", "new_k", "new_v")

    def decode(*arrays: Any) -> Any:
        arguments = dataclasses.replace(given, **dict(zip(names, arrays, strict=True)))
        return pallas_tpu.decode_in_blocks(arguments, blocks=blocks)

    arrays = [getattr(given, name) for name in names]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
    return jax.jit(decode).lower(*shapes)
