"""Compiles a layer with full heads for a chip that is not attached; prints a JSON line a program.

    PYTHONPATH=. python tests/support/compile_heads.py v5e step prefill

libtpu must be installed.
"""

import dataclasses
import json
import math
import re
import sys
import time

from tests.support import topologies  # first: it keeps JAX from looking for a TPU

# isort: split
import jax
import jax.numpy as jnp

from swaa_jax.attention import AttentionOptions, attend, attend_cached, build_cache
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import make_mesh
from tests.support import compile_decode as single

LAYER = LayerAttention(window=2048, num_sink_tokens=128, full_heads=(0, 2, 5, 7))
LENGTH, SLOTS = 8192, 131072
# Name: kind, (N, K, H), full heads, backend. Where the kernel does not take a number of heads,
# `auto` takes XLA for that part.
PROGRAMS = {
    "prefill": ("prefill", single.QWEN3_4B, (0, 2, 5, 7), "pallas_tpu"),
    "gradient": ("gradient", single.QWEN3_4B, (0, 2, 5, 7), "pallas_tpu"),
    "step": ("step", single.QWEN3_4B, (0, 2, 5, 7), "pallas_tpu"),
    "step, H 64": ("step", (32, 8, 64), (0, 2, 5, 7), "pallas_tpu"),
    "step, 2 of 8": ("step", single.QWEN3_4B, (3, 4), "auto"),
}


def cache_of(k, v, layer, mesh=None):
    lengths = jnp.full((1,), LENGTH, jnp.int32)
    return build_cache(k, v, lengths=lengths, layer=layer, cache_size=SLOTS, mesh=mesh)


def program(kind, heads, full_heads, backend, *, mesh, on):
    """The jitted function, its arguments, and the cache of these shapes."""
    num_heads, num_kv_heads, head_dim = heads
    layer = dataclasses.replace(LAYER, full_heads=full_heads)
    how = {"layer": layer, "options": AttentionOptions(mesh=mesh, backend=backend)}

    def qkv(length):
        counts = (num_heads, num_kv_heads, num_kv_heads)
        return [single.abstract(on, 1, length, count, head_dim) for count in counts]

    def prefill(q, k, v):
        return attend(q, k, v, **how), cache_of(k, v, layer, mesh)

    def gradient(q, k, v):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, **how).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def step(cache, q, k, v, pos_B):
        return attend_cached(q, k, v, cache, pos_B=pos_B, **how)

    cache = jax.eval_shape(lambda k, v: cache_of(k, v, layer), *qkv(LENGTH)[1:])
    cache = jax.tree.map(lambda x: single.abstract(on, *x.shape, dtype=x.dtype), cache)
    if kind == "step":
        pos_B = single.abstract(on, 1, dtype=jnp.int32)
        return jax.jit(step, donate_argnums=0), (cache, *qkv(1), pos_B), cache
    return jax.jit(prefill if kind == "prefill" else gradient), qkv(LENGTH), cache


def main(chip, *names):
    devices = topologies.devices_of(chip)
    on = jax.sharding.SingleDeviceSharding(devices[0])
    mesh = make_mesh(devices[:1])  # tells the backend what it is for
    for name in names:
        begun = time.perf_counter()
        function, arguments, cache = program(*PROGRAMS[name], mesh=mesh, on=on)
        compiled = function.lower(*arguments).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        parts = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim == 4]
        row = {
            "program": name,
            "kernels": sorted(re.findall(r"%(swa_[a-z_]+)[.\d]* = .*custom-call", text)),
            "temporary_bytes": memory.temp_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
            "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in parts),
            # Of the largest part or more.
            "copies": single.count_copies(text, max(math.prod(leaf.shape) for leaf in parts)),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
