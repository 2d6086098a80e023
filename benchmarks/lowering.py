"""Host time and memory until a TPU program is ready to compile: windowed attention with sinks.

    python benchmarks/lowering.py                    ours at 32,768 and 131,072 tokens
    python benchmarks/lowering.py --peers splash     JAX's Splash beside it (minutes)

Building the mask or the work list, tracing and lowering for a TPU; nothing is compiled or run, so
neither a TPU nor its compiler is needed. Each measurement is a process of its own; memory is the
peak above what the process held with JAX imported and started.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

from machine import processor, version

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Qwen3-4B's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072], help="tokens")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument("--peers", nargs="*", default=[], choices=["splash"])
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "lowering.json")
    parser.add_argument("--measure", choices=["swaa", "splash"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for length in arguments.lengths:
        for kernel in ("swaa", *arguments.peers):
            row = measured(kernel, length, arguments)
            rows.append(row)
            print(
                f"{kernel:7} {length:7,} tokens, window {arguments.window:,} + {arguments.sinks}: "
                f"{row['seconds']:7.2f} s, {row['mib']:6,} MiB",
                flush=True,
            )
    result = {
        "command": " ".join(["python", "benchmarks/lowering.py", *sys.argv[1:]]),
        "what": "host time and peak memory to build, trace and lower a forward pass for TPUs",
        "processor": processor(),
        "versions": {"jax": version("jax")},
        "rows": rows,
    }
    path = pathlib.Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def measured(kernel: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    settings = {"lengths": length, "window": arguments.window, "sinks": arguments.sinks}
    command = [sys.executable, __file__, "--measure", kernel]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{kernel} at {length} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    (length,) = arguments.lengths
    q = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, length, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    build = {"swaa": swaa, "splash": splash}[arguments.measure]
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))
    before = peak_mib()
    start = time.perf_counter()
    attend = build(length, arguments.window, arguments.sinks)
    jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("tpu",))
    return {
        "kernel": arguments.measure,
        "tokens": length,
        "window": arguments.window,
        "sinks": arguments.sinks,
        "seconds": round(time.perf_counter() - start, 2),
        "mib": peak_mib() - before,
    }


def peak_mib() -> int:
    """Peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def swaa(length: int, window: int, sinks: int) -> Any:
    """This project's kernel; its work list is built inside the program."""
    from kernels_pallas import Target, swa_prefill

    del length
    chip = Target(platform="tpu", device_kind="TPU v5 lite")
    return lambda q, k, v: swa_prefill(
        q, k, v, window=window, num_sink_tokens=sinks, backend="pallas_tpu", target=chip
    )


def splash(length: int, window: int, sinks: int) -> Any:
    """JAX's Splash; its mask is gone through here, on the host."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    local = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
    first = splash_attention_mask.NumpyMask(_sink_mask(length, sinks))
    causal = splash_attention_mask.CausalMask((length, length))
    mask = splash_attention_mask.MultiHeadMask([local | (first & causal)] * (HEADS // KV_HEADS))
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask)

    def attend(q: Any, k: Any, v: Any) -> Any:
        q = q.reshape(1, length, KV_HEADS, -1, HEAD_DIM).transpose(0, 2, 3, 1, 4)
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        return jax.vmap(jax.vmap(kernel))(q, k, v)

    return attend


def _sink_mask(length: int, sinks: int) -> Any:
    """``[T, T]``, one row repeated: no memory of its own."""
    import numpy as np

    return np.broadcast_to(np.arange(length) < sinks, (length, length))


if __name__ == "__main__":
    main()
