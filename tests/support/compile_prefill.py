"""Compiles the TPU prefill kernels for a chip that is not attached; prints a JSON line a program.

Run as ``PYTHONPATH=. python tests/support/compile_prefill.py v5e windows``; libtpu must be
installed.
"""

import json
import sys
import time

from tests.support import topologies  # first: it keeps JAX from looking for a TPU

# isort: split
import jax
import jax.numpy as jnp

from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.pallas_tpu import compute

QWEN3_4B = (32, 8, 128)
SINKS = 128
# Length, heads (N, K, H), dtype, window (None: full causal, "rows": traced, one a row), gradient,
# everything else too (lengths, full rows, segments, offset, soft cap).
WINDOWS = [
    (length, QWEN3_4B, "bfloat16", window, True, False)
    for length in (8192, 131072)
    for window in (2048, 4096, None)
]
LONGEST = [program for program in WINDOWS if program[0] == 131072 and program[3] != 4096]
LONGEST_WINDOW = [program for program in LONGEST if program[3]]
FORWARD = [(*program[:4], False, program[5]) for program in WINDOWS]
FEATURES = [(4000, (8, 2, 64), "bfloat16", "rows", True, True)]  # H of 128 is in MORE
MORE = [
    (3000, (num_heads, num_kv_heads, head_dim), dtype, 512, True, True)
    for num_heads, num_kv_heads, head_dim in ((4, 4, 80), (6, 2, 96), (8, 1, 256), (16, 2, 128))
    for dtype in ("bfloat16", "float32")
]
SETS = {
    "windows": WINDOWS,
    "longest": LONGEST,
    "longest window": LONGEST_WINDOW,
    "forward": FORWARD,
    "features": FEATURES,
    "more": MORE,
}


def compile_program(generation, on, length, heads, dtype, window, gradient, everything):
    """Seconds, kernels in the program and bytes of device memory."""
    num_heads, num_kv_heads, head_dim = heads

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on)

    traced = {}
    if window == "rows":
        traced |= {"window": shape(1), "num_sink_tokens": shape(1)}
    if everything:
        traced |= {"lengths": shape(1), "q_full": shape(1, length, dtype=jnp.bool_)}
        traced |= {"segment_ids": shape(1, length + 500), "q_offset": shape()}
    num_keys = length + 500 if everything else length
    fixed = dict(
        window=window,
        num_sink_tokens=SINKS,
        scale=head_dim**-0.5,
        return_lse=True,
        softcap=30.0 if everything else None,
    )

    def attend(q, k, v, traced):
        arguments = PrefillArguments(q=q, k=k, v=v, **(fixed | traced))
        return compute(arguments, generation=generation)

    def gradients(q, k, v, cotangents, traced):
        result, pull_back = jax.vjp(lambda *qkv: attend(*qkv, traced), q, k, v)
        return result, pull_back(cotangents)

    q = shape(1, length, num_heads, head_dim, dtype=dtype)
    k = shape(1, num_keys, num_kv_heads, head_dim, dtype=dtype)
    start = time.monotonic()
    if gradient:
        result = jax.eval_shape(attend, q, k, k, traced)
        cotangents = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), result)
        lowered = jax.jit(gradients).lower(q, k, k, cotangents, traced)
    else:
        lowered = jax.jit(attend).lower(q, k, k, traced)
    lower_s = time.monotonic() - start
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "generation": generation,
        "length": length,
        "heads": heads,
        "dtype": dtype,
        "window": window,
        "gradient": gradient,
        "kernels": [name for name in ("forward", "dq", "dkv") if f"swa_prefill_{name}" in text],
        "lower_s": round(lower_s, 2),
        "compile_s": round(time.monotonic() - start - lower_s, 1),
        "gib": round((memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30, 2),
    }


def main(generation, *names):
    on = jax.sharding.SingleDeviceSharding(topologies.devices_of(generation)[0])
    for name in names:
        for program in SETS[name]:
            print(json.dumps(compile_program(generation, on, *program)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
