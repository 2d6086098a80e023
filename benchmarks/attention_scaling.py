"""How the blockwise attention scales with length on a CPU, and against torch's attention.

Three questions, one command:

1. Does time grow linearly? A windowed layer at 4k .. 32k tokens; time at the last length over time
   at the first (8 times the tokens: 8 is linear, the target is at most 10).
2. Does memory? XLA's own figure for the compiled program: bytes of temporaries plus the output, on
   top of q, k and v.
3. What does skipping buy? ``torch.nn.functional.scaled_dot_product_attention`` given the same mask
   as a dense boolean array computes every pair; both run in one process, in turns, on the same
   cores.

The default shape is Qwen3-0.6B's attention: 16 query heads, 8 KV heads, head dim 128, float32.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import processor, version

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """
examples:
  # Everything, about five minutes on two cores; writes benchmarks/results/attention_scaling.json
  python benchmarks/attention_scaling.py

  # Without torch, a wider window, other lengths
  python benchmarks/attention_scaling.py --no-torch --window 2048 --lengths 8192 16384 --output -

Times are medians over --repeats calls after two warm-up calls; minima and the processor's own
seconds (all threads) stand beside them. What is compared takes turns, so that other work on the
machine hits all alike; where it still shows (median far from minimum), repeat the run. torch is
needed for the comparison only (requirements/torch.txt).
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="tokens T"
    )
    parser.add_argument("--window", type=int, default=512, help="keys a query sees, with itself")
    parser.add_argument("--sinks", type=int, default=10, help="first tokens that stay visible")
    parser.add_argument("--heads", type=int, default=16, help="query heads N")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads K")
    parser.add_argument("--head-dim", type=int, default=128, help="head dim H")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls each")
    parser.add_argument("--threads", type=int, default=2, help="cores for both libraries")
    parser.add_argument(
        "--compare-length", type=int, default=8192, help="tokens of the comparison with torch"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave the comparison out")
    parser.add_argument(
        "--output",
        default=str(ROOT / "benchmarks" / "results" / "attention_scaling.json"),
        help="where to write the JSON; - for nowhere (default: %(default)s)",
    )
    parser.add_argument("--worker", choices=("lengths", "torch"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Limit the cores, then measure (a worker) or report."""
    arguments = parse_arguments()
    # The thread pools take their size from the cores that the process may use.
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)
    if arguments.worker == "lengths":
        print(json.dumps(measure_lengths(arguments)))
    elif arguments.worker == "torch":
        print(json.dumps(measure_against_torch(arguments)))
    else:
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Measure in worker processes, print the table, write the JSON."""
    load_before = os.getloadavg()
    print(
        f"window {arguments.window}, {arguments.sinks} sinks, N={arguments.heads} "
        f"K={arguments.kv_heads} H={arguments.head_dim}, float32, {arguments.threads} threads"
    )
    print(f"{'tokens':>8} {'median s':>9} {'min s':>9} {'cpu s':>9} {'XLA MiB':>9}")
    rows = run_worker("lengths")
    for row in rows:
        print(
            f"{row['tokens']:>8} {row['median_s']:>9.3f} {row['min_s']:>9.3f} "
            f"{row['median_cpu_s']:>9.3f} {row['xla_temp_and_output_mib']:>9.0f}"
        )
    first, last = rows[0], rows[-1]
    growth = {key: last[key] / first[key] for key in first} | {"time_target_at_most": 10}
    print(
        f"growth   tokens x{growth['tokens']:.1f}   time x{growth['median_s']:.2f} (minima "
        f"x{growth['min_s']:.2f}, cpu x{growth['median_cpu_s']:.2f}, target <= 10)   memory "
        f"x{growth['xla_temp_and_output_mib']:.2f}",
        flush=True,
    )
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/attention_scaling.py", *sys.argv[1:]]),
        "window": arguments.window,
        "num_sink_tokens": arguments.sinks,
        "shape": {"N": arguments.heads, "K": arguments.kv_heads, "H": arguments.head_dim},
        "dtype": "float32",
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "scaling": rows,
        "growth": growth,
    }
    if not arguments.no_torch:
        against = run_worker("torch")
        result["against_torch"] = against
        for name, timing in against["timings"].items():
            print(f"{name:<34} median {timing['median_s']:.3f} s   min {timing['min_s']:.3f} s")
        print(
            f"torch / ours at {arguments.compare_length} tokens: {against['ratio_median']:.1f} "
            f"(minima {against['ratio_min']:.1f}, target >= 4.5); outputs differ by "
            f"{against['max_abs_difference']:.1e}"
        )
    result["machine"] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "numpy")},
        "load_average_before_and_after": [load_before[0], os.getloadavg()[0]],
    }
    if arguments.output != "-":
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


def run_worker(kind: str) -> Any:
    """What a fresh process of this script measures; its thread pools have the asked size."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed(functions: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, dict[str, float]]:
    """Seconds of each function's calls; the functions take turns."""
    walls: dict[Any, list[float]] = {name: [] for name in functions}
    cpus: dict[Any, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):  # the first two warm up
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= 2:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
            time.sleep(0.1)  # idle threads of one library stop spinning before the other starts
    return {
        name: {
            "median_s": statistics.median(walls[name]),
            "min_s": min(walls[name]),
            "median_cpu_s": statistics.median(cpus[name]),
        }
        for name in functions
    }


def ours(length: int, arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """The compiled prefill and its inputs."""
    import jax

    from kernels_pallas import swa_prefill

    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = tuple(
        jax.random.normal(key, (1, length, count, arguments.head_dim))
        for key, count in zip(keys, heads, strict=True)
    )

    @jax.jit
    def attention(q, k, v):
        return swa_prefill(
            q, k, v, window=arguments.window, num_sink_tokens=arguments.sinks, backend="xla"
        )

    return attention.lower(*arrays).compile(), arrays


def measure_lengths(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Time and memory at every length."""
    programs = {length: ours(length, arguments) for length in arguments.lengths}
    timings = timed(
        {
            length: lambda program=program, arrays=arrays: program(*arrays).block_until_ready()
            for length, (program, arrays) in programs.items()
        },
        arguments.repeats,
    )

    def mebibytes(program: Any) -> float:
        analysis = program.memory_analysis()
        return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20

    return [
        {
            "tokens": length,
            **timings[length],
            "xla_temp_and_output_mib": mebibytes(programs[length][0]),
        }
        for length in arguments.lengths
    ]


def measure_against_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours and torch in turns. torch gets its keys repeated beforehand, or repeats them itself."""
    import numpy as np
    import torch

    torch.set_num_threads(arguments.threads)
    attention, arrays = ours(arguments.compare_length, arguments)
    # [B, T, N, H] to torch's [B, N, T, H]
    q, k, v = (torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arrays)
    num_groups = arguments.heads // arguments.kv_heads
    k_repeated, v_repeated = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
    index = torch.arange(arguments.compare_length)
    distance = index[:, None] - index[None]
    mask = (distance >= 0) & ((distance < arguments.window) | (index[None] < arguments.sinks))

    def torch_attention(q, k, v, **keywords):
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, **keywords
            )

    functions = {
        "ours": lambda: attention(*arrays).block_until_ready(),
        "torch SDPA, keys repeated before": lambda: torch_attention(q, k_repeated, v_repeated),
        "torch SDPA, enable_gqa": lambda: torch_attention(q, k, v, enable_gqa=True),
    }
    timings = timed(functions, arguments.repeats)
    wanted = torch_attention(q, k_repeated, v_repeated).transpose(1, 2).numpy()
    difference = float(np.abs(np.asarray(attention(*arrays)) - wanted).max())

    def ratio(key: str) -> float:
        peers = (timing[key] for name, timing in timings.items() if name != "ours")
        return min(peers) / timings["ours"][key]

    return {
        "tokens": arguments.compare_length,
        "timings": timings,
        "ratio_median": ratio("median_s"),
        "ratio_min": ratio("min_s"),
        "ratio_target_at_least": 4.5,
        "ratio_is": "the faster torch call over ours",
        "max_abs_difference": difference,
    }


if __name__ == "__main__":
    main()
