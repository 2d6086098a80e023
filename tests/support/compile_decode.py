"""Compiles the TPU decode kernel for a chip that is not attached; prints what it needs, as JSON.

Run as ``python tests/support/compile_decode.py v5e``; libtpu must be installed.
"""

import json
import math
import os
import re
import sys
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_decode.pallas_tpu import (
    DecodeBlocks,
    choose_blocks,
    decode_in_blocks,
)
from swaa_jax.attention import FullCache, RingCache, attend_cached
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import make_mesh

# Name: B, n, S, (N, K, H), dtype, window and sinks (-1, 0: a full layer), soft cap, splits
QWEN3_4B = (32, 8, 128)
PROGRAMS = {
    "full, 128k": (1, 1, 131072, QWEN3_4B, jnp.bfloat16, (-1, 0), None, 1),
    "full, 128k, two cores": (1, 1, 131072, QWEN3_4B, jnp.bfloat16, (-1, 0), None, 2),
    "full rows, 128k, 8 new": (1, 8, 131072, QWEN3_4B, jnp.bfloat16, (2048, 128), None, 1),
    "ring": (4, 1, 2048 + 128, QWEN3_4B, jnp.bfloat16, (2048, 128), None, 1),
    "ring, 8 new, soft cap": (4, 8, 2048 + 10, QWEN3_4B, jnp.bfloat16, (2048, 10), 50.0, 1),
    "float32": (2, 1, 5000, (32, 8, 128), jnp.float32, (1024, 4), None, 1),
    "H 64, K 4": (2, 3, 8000, (16, 4, 64), jnp.bfloat16, (1024, 4), None, 1),
    "H 80, K 2": (2, 1, 8000, (4, 2, 80), jnp.bfloat16, (1024, 4), None, 1),
    "H 96, K 32": (2, 1, 8000, (32, 32, 96), jnp.bfloat16, (1024, 4), None, 1),
}


def abstract(on, *sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=on)


def decode_program(on, batch, new, slots, heads, dtype, rule, softcap, splits):
    """The function and its arguments: attention alone."""
    num_heads, num_kv_heads, head_dim = heads
    window, sinks = rule
    new_kv = abstract(on, batch, new, num_kv_heads, head_dim, dtype=dtype)
    cache = abstract(on, batch, slots, num_kv_heads, head_dim, dtype=dtype)
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

    def run(arrays):
        given = DecodeArguments(
            **arrays,
            window=None if window < 0 else window,
            num_sink_tokens=sinks,
            scale=0.1,
            softcap=softcap,
        )
        blocks = DecodeBlocks(slots=choose_blocks(given).slots, splits=splits)
        return decode_in_blocks(given, blocks=blocks)

    return jax.jit(run), (arrays,), cache


def step_program(mesh, slots, layer):
    """A layer's step: attention to the cache, then the cache with the new token, in place."""
    num_heads, num_kv_heads, head_dim = QWEN3_4B
    on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    kv = abstract(on, 1, slots, num_kv_heads, head_dim)
    new_kv = abstract(on, 1, 1, num_kv_heads, head_dim)
    cache = FullCache(k=kv, v=kv)
    if not layer.needs_full_cache:
        cache = RingCache(
            k=kv,
            v=kv,
            slot_positions=abstract(on, 1, slots, dtype=jnp.int32),
            num_sink_tokens=layer.num_sink_tokens,
        )

    def run(cache, q, k, v, pos_B):
        return attend_cached(q, k, v, cache, layer=layer, pos_B=pos_B, mesh=mesh)

    q, pos_B = abstract(on, 1, 1, num_heads, head_dim), abstract(on, 1, dtype=jnp.int32)
    return jax.jit(run, donate_argnums=0), (cache, q, new_kv, new_kv, pos_B), kv


def count_copies(text, size):
    """Operations of the program that copy an array of at least this size."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    return sum(math.prod(map(int, shape.split(","))) >= size for shape in shapes)


def main(chip: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
    on = jax.sharding.SingleDeviceSharding(topology.devices[0])
    made = {name: decode_program(on, *sizes) for name, sizes in PROGRAMS.items()}
    ring = LayerAttention(window=2048, num_sink_tokens=128)
    mesh = make_mesh(topology.devices[:1])
    made["step, full, 128k"] = step_program(mesh, 131072, LayerAttention())
    made["step, ring"] = step_program(mesh, 2048 + 128, ring)
    rows = []
    for name, (function, arrays, cache) in made.items():
        begun = time.perf_counter()
        compiled = function.lower(*arrays).compile()
        memory = compiled.memory_analysis()
        rows.append(
            {
                "program": name,
                "temporary_bytes": memory.temp_size_in_bytes,
                "cache_bytes": 2 * cache.size * cache.dtype.itemsize,
                "copies": count_copies(compiled.as_text(), cache.size),
                "is_copied": cache.shape[3] % 128 != 0,
                "seconds": round(time.perf_counter() - begun, 1),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
