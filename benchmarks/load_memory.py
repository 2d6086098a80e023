"""Host memory that `load_model` takes, against the bytes of the parameters it loads.

A random Qwen3 checkpoint of 2 GB is loaded in fresh processes on the CPU: on one device, and split
over eight fake ones. There the parameters themselves lie in the process's memory, so what comes on
top of them is what loading costs: at most 15% on one device, at most 30% on eight. Embedding and
head are 30% of the bytes each, and the head, which has to be turned, is loaded last: a second copy
of it would break both bounds.

Measured is RssAnon of /proc/PID/status: resident memory without the mapped pages of files, which
the kernel drops when it needs room. This process reads it every few milliseconds from outside, so
that nothing inside a long call is missed, and subtracts what the loading process held before, idle,
after its imports and the start of JAX's backend.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import processor, version

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """
examples:
  # Everything, under two minutes; writes benchmarks/results/load_memory.json
  python benchmarks/load_memory.py

  # Keep the checkpoint for the next run; float32 parameters from the bfloat16 files
  python benchmarks/load_memory.py --dir /tmp/qwen3-2gb --output -
  python benchmarks/load_memory.py --dir /tmp/qwen3-2gb --dtype float32 --output -

  # A deeper model whose head is the embedding
  python benchmarks/load_memory.py --tied --layers 14 --output -

The exit code is 1 where a bound does not hold. Needs Linux, 3 GB of disk, 3 GB of memory.
"""
LAYOUTS = {"one device": {}, "fsdp=8": {"fsdp": 8}, "fsdp=4,tensor=2": {"fsdp": 4, "tensor": 2}}
ONE_DEVICE_AT_MOST, EIGHT_DEVICES_AT_MOST = 0.15, 0.30


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8, help="50M parameters each at width 2048")
    parser.add_argument("--width", type=int, default=2048, help="D; Qwen3-1.7B's by default")
    parser.add_argument("--vocab", type=int, default=151936, help="V; Qwen3's by default")
    parser.add_argument("--tied", action="store_true", help="no head beside the embedding")
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters once loaded")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--shard-mb", type=int, default=500, help="largest file, in 10**6 bytes")
    parser.add_argument("--interval-ms", type=float, default=2.0, help="between two readings")
    parser.add_argument("--dir", help="make the checkpoint here, or take the one that is there")
    parser.add_argument(
        "--output",
        default=str(ROOT / "benchmarks" / "results" / "load_memory.json"),
        help="where to write the JSON; - for nowhere (default: %(default)s)",
    )
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Make the checkpoint and measure, or load it (a worker)."""
    arguments = parse_arguments()
    if arguments.worker is not None:
        load(arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="load_memory-") as scratch:
        arguments.dir = arguments.dir or scratch
        if not (Path(arguments.dir) / "config.json").exists():
            make_checkpoint(Path(arguments.dir), arguments)
        return report(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Measure each layout in a process of its own, print the table, write the JSON."""
    files = sorted(Path(arguments.dir).glob("*.safetensors"))
    print(
        f"Qwen3, {arguments.layers} layers, D={arguments.width}, V={arguments.vocab}: "
        f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} files, "
        f"loaded as {arguments.dtype}. MB are 10**6 bytes."
    )
    print(
        f"{'layout':<16} {'params':>8} {'idle':>7} {'peak':>8} {'held':>8} {'over':>7} {'bound':>6}"
        f" {'seconds':>8}"
    )
    rows = []
    for layout in arguments.layouts:
        row = measure(layout, arguments)
        rows.append(row)
        print(
            f"{layout:<16} {row['parameter_bytes'] / 1e6:>8.0f} {row['idle_bytes'] / 1e6:>7.0f} "
            f"{row['peak_bytes'] / 1e6:>8.0f} {row['held_bytes'] / 1e6:>8.0f} "
            f"{100 * row['peak_over_parameters']:>+6.1f}% {100 * row['at_most']:>+5.0f}% "
            f"{row['seconds']:>8.1f}",
            flush=True,
        )
    print("peak and held (after loading) are less the idle process; over is peak against params.")
    holds = all(row["peak_over_parameters"] <= row["at_most"] for row in rows)
    print("The bounds hold." if holds else "A BOUND DOES NOT HOLD.")
    result = {
        "command": " ".join(["python", "benchmarks/load_memory.py", *sys.argv[1:]]),
        "checkpoint": {
            "layers": arguments.layers,
            "D": arguments.width,
            "V": arguments.vocab,
            "tied": arguments.tied,
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        },
        "dtype": arguments.dtype,
        "interval_ms": arguments.interval_ms,
        "rows": rows,
        "bounds_hold": holds,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "versions": {
                name: version(name) for name in ("jax", "jaxlib", "flax", "safetensors", "numpy")
            },
        },
    }
    if arguments.output != "-":
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")
    return 0 if holds else 1


def make_checkpoint(directory: Path, arguments: argparse.Namespace) -> None:
    """Write the random checkpoint; one shard is in memory at a time."""
    import ml_dtypes
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from swaa_jax import checkpoint
    from swaa_jax.models import FAMILIES

    config = hf_config(arguments)
    family = FAMILIES["qwen3"]
    ours = family.config_class.from_hf(config)
    rng = np.random.default_rng(0)

    def tensors():
        for name, shape in shapes(ours, family.weight_rules(ours), arguments.layers):
            value = rng.standard_normal(shape, dtype=np.float32)
            value *= 0.02
            yield name, value.astype(ml_dtypes.bfloat16)

    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_safetensors(directory, tensors(), max_shard_size=arguments.shard_mb * 10**6)
    checkpoint.write_config(directory, {**config, "dtype": "bfloat16"})


def hf_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Qwen3-1.7B's config.json, but for the depth."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.width,
        "intermediate_size": 3 * arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.width // 128,
        "num_key_value_heads": max(1, arguments.width // 256),
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": arguments.tied,
    }


def shapes(config: Any, rules: Any, num_layers: int) -> Any:
    """Names and shapes in the checkpoint, in the order of the family's table."""
    import jax
    from flax import nnx

    from swaa_jax.checkpoint.keymap import expand
    from swaa_jax.models import FAMILIES

    model = nnx.eval_shape(
        lambda: FAMILIES["qwen3"].model_class(config, dtype=jax.numpy.bfloat16, rngs=nnx.Rngs(0))
    )
    params = {
        ".".join(map(str, path)): tuple(param.shape)
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    for row in expand(rules, num_layers):
        yield row.hf, row.transform.shape(params[row.ours])


def measure(layout: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load in a fresh process and watch its memory from here."""
    devices = 8 if LAYOUTS[layout] else 1
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--dir", arguments.dir, "--worker", layout]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "idle":
            raise SystemExit(f"{layout}: the loading process ended before it began")
        os.set_blocking(process.stdout.fileno(), False)
        idle = peak = anonymous_bytes(process.pid)
        readings = 0
        process.stdin.write("load\n")
        process.stdin.flush()
        answer = ""
        while not answer.endswith("\n"):
            if process.poll() is not None:
                raise SystemExit(f"{layout}: the loading process ended, code {process.returncode}")
            held = anonymous_bytes(process.pid)
            peak = max(peak, held)
            readings += 1
            answer += process.stdout.readline() or ""
            time.sleep(arguments.interval_ms / 1e3)
        process.stdin.close()
    loaded = json.loads(answer)
    return {
        "layout": layout,
        "devices": devices,
        **loaded,
        "idle_bytes": idle,
        "peak_bytes": peak - idle,
        "held_bytes": held - idle,
        "peak_over_parameters": (peak - idle) / loaded["parameter_bytes"] - 1,
        "at_most": ONE_DEVICE_AT_MOST if devices == 1 else EIGHT_DEVICES_AT_MOST,
        "readings": readings,
    }


def anonymous_bytes(pid: int) -> int:
    """RssAnon: resident memory of the process that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/PID/status: the process has ended, or this is no Linux")


def load(arguments: argparse.Namespace) -> None:
    """The worker: start everything, say so, load when told, say how much, wait for the end."""
    import jax
    from flax import nnx

    import swaa_jax as swaa
    from swaa_jax import sharding

    jax.numpy.zeros(8).block_until_ready()
    sizes = LAYOUTS[arguments.worker]
    mesh = sharding.make_mesh(**sizes) if sizes else None
    load_model = swaa.load_model  # imports what it needs, before the process counts as idle
    print("idle", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model = load_model(arguments.dir, dtype=arguments.dtype, mesh=mesh)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    # A replicated parameter counts once, so that its copies count as what loading costs.
    size = sum(param.nbytes for param in params)
    print(json.dumps({"parameter_bytes": size, "seconds": seconds}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    sys.exit(main())
