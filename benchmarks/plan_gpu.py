"""What `swaa plan` says of a program on the attached GPU, beside what the program then takes.

Each part asks for a plan (XLA's memory analysis, from a compile in a process of its own), compiles
the same program, and, when its turn has come, runs it with random weights: the measured peak is
`peak_bytes_in_use` of the part's own process, and the seconds are the median of three runs. The
compile is shared by JAX's cache of compiled programs. A row's share is the time that the chip's
peaks would allow, over the time that it took: `swaa plan` takes its error of times from these.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_arguments
import gpu_timing
import gpu_turns

POLICY = "window=2048,sinks=10,full_layers=1::2"
UNNAMED = {"prefill": {"[1]": "tokens", "[2]": "lengths"}}
"""By kind of program: what it calls arguments that have no name in it."""

ZERO = (
    *("step", "count", "slot", "segment_ids", "stage_ids", "number", "seed", "suppressed", "ends"),
    *("top_k", "no_repeat_ngram_size"),
)
"""Whole numbers that are 0: nothing is asked for, or done, or packed."""

MOST_OFF = 0.07
"""Of the measured peak, that a plan may be off."""
RUNS = 3
GIB = 1 << 30
EPILOG = """\
examples:
  # all cases, four of them on two GPUs; writes benchmarks/results/plan_gpu.json
  python benchmarks/plan_gpu.py

  # some of them
  python benchmarks/plan_gpu.py --cases train_8k steps_128k --output plan.json

  # the scripts alone, on the shipped model; without a GPU, on two simulated devices
  python benchmarks/plan_gpu.py --smoke
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program of a model under `POLICY`."""

    work: str
    kind: str
    model: str = "Qwen3-4B"
    context: int
    batch: int = 1
    mesh: str = "fsdp=1"


CASES = {
    "train_8k": Case(work="train", kind="train", model="Qwen3-0.6B", context=8192),
    "train_32k": Case(work="train", kind="train", model="Qwen3-0.6B", context=32768),
    "train_4b_32k": Case(work="train", kind="train", context=32768),
    "score_32k": Case(work="score", kind="prefill", context=32768),
    "score_128k": Case(work="score", kind="prefill", context=131072),
    "chunk_128k": Case(work="prefill", kind="chunk", context=131072),
    "steps_32k_x8": Case(work="decode", kind="steps", context=32768, batch=8),
    "steps_128k": Case(work="decode", kind="steps", context=131072),
    "train_32k_fsdp": Case(work="train", kind="train", context=32768, batch=2, mesh="fsdp=2"),
    "train_64k_context": Case(work="train", kind="train", context=65536, mesh="context=2"),
    "score_128k_context": Case(work="score", kind="prefill", context=131072, mesh="context=2"),
    "steps_128k_context": Case(work="decode", kind="steps", context=131072, mesh="context=2"),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu_arguments.add_cases(parser, CASES)
    gpu_turns.add_arguments(parser, jobs=len(CASES))
    return gpu_arguments.parse(parser, argv, name="plan_gpu", smoke={"jobs": 2})


def main() -> int:
    """Plans, runs, compares, writes."""
    arguments = parse_arguments()
    far: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        status = gpu_turns.run(
            arguments,
            __file__,
            arguments.cases,
            measure=measure,
            finish=lambda peaks, rows: far.update(off(rows)),
            report=report,
            plot=plot,
            about={
                "command": " ".join(["python", "benchmarks/plan_gpu.py", *sys.argv[1:]]),
                "what": "bytes and seconds of a device: planned, and measured",
                "policy": POLICY,
            },
        )
    if far:
        told = ", ".join(f"{part} {share:+.1%}" for part, share in far.items())
        print(f"more than {MOST_OFF:.0%} off: {told}", file=sys.stderr)
    return status or int(bool(far))


def off(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Parts whose plan is too far from what was measured, and by how much."""
    known = {row["part"]: row["planned_over_measured"] for row in rows if "reason" not in row}
    return {part: x - 1 for part, x in known.items() if x and abs(x - 1) > MOST_OFF}


def measure(arguments: argparse.Namespace) -> None:
    """One case, in this process: its plan, and its run."""
    gpu_timing.share_card()
    case = CASES[arguments.part]
    if arguments.smoke:  # of the process that compiles, too
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
    import jax

    from swaa_jax.plan import measure as measuring
    from swaa_jax.plan import plan
    from swaa_jax.plan.shapes import abstract_model, lowerable
    from swaa_jax.sharding import make_mesh, mesh_sizes

    if arguments.smoke:
        case = dataclasses.replace(case, model="tiny-retriever", context=1024)
    sizes = mesh_sizes("mesh", case.mesh)
    needed, here = math.prod(sizes.values()), len(jax.devices())
    if here < needed:
        raise SystemExit(f"devices: expected {needed} GPUs, got {here}")
    found: list[Any] = []

    def look(program: Any) -> dict[str, Any]:
        if program.kind == case.kind:
            found.append((program, measuring.measure(program, keep=False)))
            return found[-1][1]
        return {"found_by": "", "parts": {}, "peak": 0}

    (planned,) = plan(
        case.work,
        case.model,
        policy=POLICY,
        mesh=sizes,
        context=case.context,
        batch=case.batch,
        measure=look,
    ).figures
    program, row = found[-1]
    if "peak" not in row:
        raise SystemExit(str(row))
    devices = jax.devices()[: program.devices]
    mesh = make_mesh(devices, **sizes)
    whole = lowerable(program, abstract_model(program, mesh), mesh)
    begun = time.perf_counter()
    compiled = whole.lower().compile()
    compile_s = time.perf_counter() - begun
    before = _peak(devices[0])
    gpu_turns.take_turn()
    given = _arrays(whole.arguments, program)
    times = []
    for _ in range(1 + RUNS):
        begun = time.perf_counter()
        out = jax.block_until_ready(compiled(*given))
        times.append(time.perf_counter() - begun)
        given = _following(program.kind, given, out)
        steps = int(out[1].steps) if program.kind == "steps" else None
        del out
    peak = _peak(devices[0])
    seconds = statistics.median(times[1:])
    floor = planned.time
    if floor is not None and seconds < floor.least:
        raise SystemExit(
            f"{seconds:.4f} s are less than the chip's peaks allow, {floor.least:.4f}: this run "
            "has not done its work"
        )
    gpu_turns.tell(
        {
            "side": "swaa_jax",
            **dataclasses.asdict(case),
            "kind": program.kind,
            "chip": devices[0].device_kind,
            "planned_bytes": row["peak"],
            "planned_by": row["found_by"],
            "planned_parts": planned.parts,
            "measured_bytes": peak,
            "compiling_peak_bytes": before,
            "planned_over_measured": row["peak"] / peak if peak else None,
            "compile_s": row.get("compile_s"),
            "again_compile_s": round(compile_s, 1),
            "seconds": seconds,
            "steps": steps,
            "least_seconds": None if floor is None else floor.least,
            "share": None if floor is None else floor.least / seconds,
        }
    )


def _peak(device: Any) -> int:
    return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))


def _following(kind: str, arguments: Any, out: Any) -> Any:
    """The arguments of the next run; what was donated comes back with the results."""
    if kind == "train":
        return (out[0], *arguments[1:])
    if kind in ("chunk", "steps"):
        return (arguments[0], out[0], *arguments[2:])
    return arguments


def _arrays(shapes: Any, program: Any) -> Any:
    """Arrays of these shapes: random weights, and rows that are read to the end of their context.

    A chunk is its row's last; steps go on until the context is full.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    steps = 16
    left = {"chunk": program.chunk_size, "steps": steps * (1 + RUNS)}.get(program.kind, 0)
    seen = program.context - left
    vocab = int(program.config["vocab_size"])

    def numbers(name: str, sizes: tuple[int, ...]) -> Any:
        """Of an integer array, by its name."""
        if name in ("tokens", "targets", "token"):
            return np.random.default_rng(0).integers(10, vocab, sizes)
        if name in ("table", "pages"):
            return np.arange(math.prod(sizes)).reshape(sizes)
        if name in ("positions", "slot_positions"):
            first = seen - sizes[-1] if name == "slot_positions" else 0
            return np.broadcast_to(first + np.arange(sizes[-1]), sizes)
        named = {"pos_B": seen, "position": seen, "tokens_left": 1 << 20, **dict.fromkeys(ZERO, 0)}
        named |= dict.fromkeys(("lengths", "prompt_length", "prompt_lengths"), program.context)
        named |= dict.fromkeys(("length", "max_new_tokens"), program.chunk_size)
        if name not in named:
            raise SystemExit(f"{name}: no value is known for this argument of {program.kind}")
        return np.full(sizes, named[name])

    @functools.cache
    def weights(sizes: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        def make(key: Any) -> Any:
            return 0.02 * jax.random.normal(key, sizes, dtype)

        return jax.jit(make, out_shardings=sharding)

    def fill(path: Any, shape: Any) -> Any:
        full = jax.tree_util.keystr(path)
        name = UNNAMED.get(program.kind, {}).get(full) or re.sub(r"\W+", " ", full).split()[-1]
        if jnp.issubdtype(shape.dtype, jnp.floating):
            if len(shape.shape) >= 2 and name != "loss_weights":
                return weights(shape.shape, shape.dtype, shape.sharding)(jax.random.key(0))
            value = np.ones(shape.shape)  # of a norm, say
        elif program.kind == "steps" and full in ("[2]", "[3]"):  # all answer, so many steps
            value = np.full(shape.shape, True if full == "[2]" else steps)
        elif shape.dtype == np.bool_:
            value = np.zeros(shape.shape)
        else:
            value = numbers(name, shape.shape)
        return jax.device_put(value.astype(shape.dtype), shape.sharding)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row."""
    for row in rows:
        if "reason" in row:
            print(f"{row['part']:20} {row['reason']}", flush=True)
            continue
        told = f"{row['planned_bytes'] / GIB:.2f} GiB planned, {row['measured_bytes'] / GIB:.2f}"
        if row["planned_over_measured"]:
            told += f" measured ({row['planned_over_measured'] - 1:+.1%})"
        told += (
            f", compiling {row['compiling_peak_bytes'] / GIB:.2f}; {1e3 * row['seconds']:.1f} ms"
        )
        if row["share"] is not None:
            told += f", at least {1e3 * row['least_seconds']:.1f} ({row['share']:.0%})"
        print(
            f"{row['part']:20} {told}; compiled in {row['compile_s']} s, "
            f"{row['again_compile_s']} s again; "
            f"{json.dumps({k: round(v / GIB, 2) for k, v in row['planned_parts'].items()})}",
            flush=True,
        )


def plot(content: Mapping[str, Any], path: Path) -> None:
    """No plot: two numbers a row are read in a table."""
    del content, path


if __name__ == "__main__":
    sys.exit(main())
