"""Compiles the TPU decode kernel for chips that are not attached; prints what it needs, as JSON.

    PYTHONPATH=. python tests/support/compile_decode.py v5e v6e --only "step, ring"
    PYTHONPATH=. python tests/support/compile_decode.py v5e:2x4 --only "sharded, full, 128k"

libtpu must be installed.
"""

import argparse
import json
import math
import re
import sys
import time

from tests.support import topologies  # first: it keeps JAX from looking for a TPU

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_decode.pallas_tpu import (
    DecodeBlocks,
    choose_blocks,
    decode_in_blocks,
)
from swaa_jax.attention import AttentionOptions, FullCache, RingCache, attend_cached
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import attention_specs, make_mesh

QWEN3_4B = (32, 8, 128)
TRACED = "traced"  # window and sinks are arrays [B]
B16, F32 = jnp.bfloat16, jnp.float32
# Name: B, n, S, (N, K, H), dtype, window and sinks (-1, 0: a full layer), soft cap, splits
PROGRAMS = {
    "full, 128k": (1, 1, 131072, QWEN3_4B, B16, (-1, 0), None, 1),
    "full, 128k, two cores": (1, 1, 131072, QWEN3_4B, B16, (-1, 0), None, 2),
    "full, 128k, H 64": (1, 1, 131072, (14, 2, 64), B16, (-1, 0), None, 1),
    "full rows, 128k, 8 new": (1, 8, 131072, QWEN3_4B, B16, (2048, 128), None, 1),
    "ring": (4, 1, 2048 + 128, QWEN3_4B, B16, (2048, 128), None, 1),
    "ring, traced": (4, 1, 2048 + 128, QWEN3_4B, B16, TRACED, None, 2),
    "ring, 8 new, soft cap": (4, 8, 2048 + 10, QWEN3_4B, B16, (2048, 10), 50.0, 1),
    "ring, 8 new, traced, H 64": (4, 8, 2048 + 10, (32, 8, 64), B16, TRACED, 50.0, 2),
    "a short cache": (4, 1, 100, QWEN3_4B, B16, (100, 0), None, 1),
    "H 64, K 4": (2, 3, 8000, (16, 4, 64), B16, (1024, 4), None, 1),
    "H 64, K 1, float32": (2, 1, 8000, (8, 1, 64), F32, (1024, 4), None, 1),
    "H 80, K 2": (2, 1, 8000, (4, 2, 80), B16, (1024, 4), None, 1),
    "H 80, K 32, float32": (2, 1, 8000, (32, 32, 80), F32, (1024, 4), None, 1),
    "H 96, K 32": (2, 1, 8000, (32, 32, 96), B16, (1024, 4), None, 1),
    "H 96, K 32, float32": (2, 1, 8000, (32, 32, 96), F32, (1024, 4), None, 1),
    "H 96, K 32, 8 new": (2, 8, 8000, (32, 32, 96), B16, (1024, 4), None, 1),
    "H 96, K 8, 8 new, float32": (2, 8, 8000, (32, 8, 96), F32, (1024, 4), None, 1),
    "H 128, K 1": (2, 1, 8000, (8, 1, 128), B16, (1024, 4), None, 1),
    "H 128, K 2": (2, 8, 8000, (8, 2, 128), B16, (1024, 4), None, 1),
    "H 128, K 4": (2, 1, 8000, (32, 4, 128), B16, (1024, 4), None, 1),
    "H 128, K 40": (2, 8, 8000, (40, 40, 128), B16, (1024, 4), None, 1),
    "H 128, float32": (2, 1, 5000, QWEN3_4B, F32, (1024, 4), None, 1),
    "H 256, K 1": (2, 8, 8000, (4, 1, 256), B16, (1024, 4), None, 1),
    "H 256, K 8": (2, 8, 8000, (16, 8, 256), B16, (1024, 4), None, 1),
    "H 256, K 8, float32": (2, 1, 8000, (16, 8, 256), F32, (1024, 4), None, 1),
}
PAGES = {  # pages of 512 slots in a pool, shared by rows of up to 32k tokens
    "pages, 4 x 32k": (4, 1, 32768, QWEN3_4B, B16, (-1, 0), None, 1),
    "pages, 4 x 32k, H 64, two cores": (4, 1, 32768, (14, 2, 64), B16, (2048, 128), None, 2),
}
PAGE_SLOTS = 512
# `copies_cache` says why.
COPIED = {
    "copied, H 256, K 4": (2, 8, 8000, (8, 4, 256), B16, (1024, 4), None, 1),
    "copied, H 128, K 10": (2, 1, 8000, (40, 10, 128), B16, (1024, 4), None, 1),
}
# Name: B, S, (N, K, H), the layer
FULL, RING = LayerAttention(), LayerAttention(window=2048, num_sink_tokens=128)
STEPS = {
    "step, full, 128k": (1, 131072, QWEN3_4B, FULL),
    "step, ring": (1, 2048 + 128, QWEN3_4B, RING),
    "step, full, 128k, H 64": (1, 131072, (14, 2, 64), FULL),
    "step, ring, H 96": (4, 2048 + 128, (32, 32, 96), RING),
}
SHARDED_STEPS = {
    "sharded, full, 128k": (2, 131072, QWEN3_4B, FULL),
    "sharded, ring, H 64": (4, 2048 + 128, (32, 8, 64), RING),
}


def abstract(on, *sizes, dtype=B16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=on)


def decode_program(on, batch, new, slots, heads, dtype, rule, softcap, splits, *, paged=False):
    """The function and its arguments: attention alone."""
    num_heads, num_kv_heads, head_dim = heads
    new_kv = abstract(on, batch, new, num_kv_heads, head_dim, dtype=dtype)
    shared = (batch * slots // PAGE_SLOTS // 2, PAGE_SLOTS)  # half of what all rows could need
    rows = shared if paged else (batch, slots)
    cache = abstract(on, *rows, num_kv_heads, head_dim, dtype=dtype)
    arrays = dict(
        q=abstract(on, batch, new, num_heads, head_dim, dtype=dtype),
        cache_k=cache,
        cache_v=cache,
        q_positions=abstract(on, batch, new, dtype=jnp.int32),
        cache_positions=abstract(on, batch, slots, dtype=jnp.int32),
        new_k=new_kv,
        new_v=new_kv,
        q_full=abstract(on, batch, new, dtype=jnp.bool_),
    )
    if paged:
        arrays["page_table"] = abstract(on, batch, slots // PAGE_SLOTS, dtype=jnp.int32)
    rules = {}
    if rule == TRACED:
        arrays["window"] = arrays["num_sink_tokens"] = abstract(on, batch, dtype=jnp.int32)
    else:
        rules = dict(window=None if rule[0] < 0 else rule[0], num_sink_tokens=rule[1])

    def run(arrays):
        given = DecodeArguments(
            **arrays,
            **rules,
            scale=0.1,
            softcap=softcap,
        )
        blocks = DecodeBlocks(slots=choose_blocks(given).slots, splits=splits)
        return decode_in_blocks(given, blocks=blocks)

    return jax.jit(run), (arrays,), cache


def step_program(on, batch, slots, heads, layer, mesh=None):
    """A layer's step: attention to the cache, then the cache with the new token, in place."""
    num_heads, num_kv_heads, head_dim = heads
    rows = on
    if mesh is not None:
        specs = attention_specs(mesh, batch=batch, num_kv_heads=num_kv_heads)
        on, rows = (NamedSharding(mesh, spec) for spec in specs)
    kv = abstract(on, batch, slots, num_kv_heads, head_dim)
    new_kv = abstract(on, batch, 1, num_kv_heads, head_dim)
    cache = FullCache(k=kv, v=kv)
    if not layer.needs_full_cache:
        cache = RingCache(
            k=kv,
            v=kv,
            slot_positions=abstract(rows, batch, slots, dtype=jnp.int32),
            num_sink_tokens=layer.num_sink_tokens,
        )

    def run(cache, q, k, v, pos_B):
        options = AttentionOptions(mesh=mesh, backend="pallas_tpu")
        return attend_cached(q, k, v, cache, layer=layer, pos_B=pos_B, options=options)

    q = abstract(on, batch, 1, num_heads, head_dim)
    pos_B = abstract(rows, batch, dtype=jnp.int32)
    return jax.jit(run, donate_argnums=0), (cache, q, new_kv, new_kv, pos_B), kv


def count_copies(text, size):
    """Operations of the program that copy or rearrange an array of at least this size."""
    names = "copy|reshape|transpose"  # a reshape that moves nothing is called a bitcast
    shapes = re.findall(rf"= \w+\[([\d,]+)\]\S* (?:{names})\(", text)
    return sum(math.prod(map(int, shape.split(","))) >= size for shape in shapes)


def collectives(text):
    """Operations of the program that send something between devices."""
    names = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" ({names})(?:-start)?\(", text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "chips", nargs="+", help=f"some of {', '.join(topologies.TOPOLOGIES)}, or v5e:2x4"
    )
    parser.add_argument(
        "--only", nargs="+", help="programs; default: all, but none sharded or copied"
    )
    return parser.parse_args()


def main(chip: str, only: list[str]) -> list[dict]:
    devices = topologies.devices_of(chip)
    on = jax.sharding.SingleDeviceSharding(devices[0])
    rows = []
    for name in only:
        begun = time.perf_counter()
        if name in PROGRAMS | PAGES | COPIED:
            given = (PROGRAMS | PAGES | COPIED)[name]
            function, arrays, cache = decode_program(on, *given, paged=name in PAGES)
        elif name in STEPS:
            mesh = make_mesh(devices[:1])  # tells the backend what it is for
            function, arrays, cache = step_program(on, *STEPS[name], mesh=mesh)
        else:
            mesh = make_mesh(devices, data=2, tensor=4)
            function, arrays, cache = step_program(on, *SHARDED_STEPS[name], mesh=mesh)
        compiled = function.lower(*arrays).compile()
        memory = compiled.memory_analysis()
        size = math.prod(cache.sharding.shard_shape(cache.shape))  # one device's part
        rows.append(
            {
                "chip": chip,
                "device_kind": devices[0].device_kind,
                "program": name,
                "is_step": name in STEPS | SHARDED_STEPS,
                "temporary_bytes": memory.temp_size_in_bytes,
                "aliased_bytes": memory.alias_size_in_bytes,
                "cache_bytes": 2 * size * cache.dtype.itemsize,
                "copies": count_copies(compiled.as_text(), size),
                "collectives": collectives(compiled.as_text()),
                "seconds": round(time.perf_counter() - begun, 1),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    given = parse_arguments()
    programs = given.only or [*PROGRAMS, *PAGES, *STEPS]
    print(json.dumps([row for chip in given.chips for row in main(chip, programs)]))
