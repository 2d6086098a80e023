"""What whole models need on TPUs that are not there: memory and compile time, from the compiler.

A list of calls of what `swaa plan` runs: each program is compiled by libtpu, the real compiler, for
a topology that is not attached; no weights are read or made. The table says how much memory a
device needs (arguments are weights and caches, temporaries what the program adds), whether that
fits, and how long tracing with lowering, and compiling, took: seconds on the clock, and of both
together on all cores (a busy machine stretches the former). Nothing here has run on a TPU.

    prefill       a prompt of the given length: the last row's logits, and the caches
    chunk         the engine's: 1,024 tokens of a prompt, rows as long as the given length
    steps         the engine's: up to 16 tokens of every row
    decode-full   one token against caches of that length, all full, which are donated
    decode-ring   the same under a window in every layer: ring caches of window + sinks slots
    train         a step of LoRA training (rank 16 on q, k, v) on packed rows of that length; the
                  backward pass computes each layer again; adapters and optimizer are donated

The exit code is 1 where a program fails for another reason than memory, where this package's
kernels are not in it, or where experts multiply more than 1.2 times what the active ones need.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_experts import COUNTED, moe_flops_ratio
from aot_programs import CHIPS, EIGHT, KINDS, SPLITS, Program, default_programs, hbm_gib
from machine import version
from model_shapes import MODELS
from rich.console import Console
from rich.table import Table

from swaa_jax.plan.measure import compile_apart

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
MOST_MOE_FLOPS = 1.2
EPILOG = """\
examples:
  # everything: hours on two cores; writes benchmarks/results/aot_models.json after each row
  pip install -r requirements/libtpu.txt && python benchmarks/aot_models.py

  # go on where that was interrupted; quickly, for upper bounds
  python benchmarks/aot_models.py --resume
  python benchmarks/aot_models.py --resume --effort -1

  # what would be compiled
  python benchmarks/aot_models.py --list

  # does Qwen3-4B's prompt of 64k tokens fit on one v6e chip, with every other layer full?
  python benchmarks/aot_models.py --models Qwen3-4B --chips v6e --mesh tensor=1 \\
      --programs prefill --contexts 65536 --output -

  # another policy, another model (any config.json of a supported family), 16 sinks
  python benchmarks/aot_models.py --models ~/models/Qwen3-8B/config.json --chips v6e \\
      --mesh tensor=8 --programs prefill decode-full --contexts 131072 --window 4096 --sinks 16
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to compile; with --models, all combinations")
    what.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose names (see --list) hold all of these"
    )
    what.add_argument("--list", action="store_true", help="print the rows' names and stop")
    what.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}, or the path of a config.json; default: a list of its own",
    )
    what.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e"])
    what.add_argument(
        "--mesh",
        default=None,
        metavar="SIZES",
        help="such as fsdp=2,tensor=4: a chip's first 1, 2, 4 or 8 devices (default: tensor=8, "
        "with experts tensor=4,expert=2)",
    )
    what.add_argument("--programs", nargs="+", choices=KINDS, default=["prefill"])
    what.add_argument("--contexts", nargs="+", type=int, default=[32768], metavar="TOKENS")
    what.add_argument("--batch", type=int, default=1, metavar="ROWS")
    what.add_argument("--layers", type=int, help="instead of the model's own number")
    what.add_argument(
        "--effort",
        type=float,
        default=0.0,
        metavar="E",
        help="of the compiler, -1 to 1; default 0, as when programs are run. -1 compiles several "
        "times faster, to a program that needs more memory",
    )
    policy = parser.add_argument_group("attention policy (decode-ring: window and sinks alone)")
    policy.add_argument("--window", type=int, help="keys a row sees; default 2048; 0: all")
    policy.add_argument("--sinks", type=int, help="first tokens that stay visible; default 128")
    policy.add_argument("--full-layers", metavar="LAYERS", help="default 1::2; '' for none")
    policy.add_argument("--decode", choices=["full", "window"], help="default full")
    parser.add_argument(
        "--output", default=None, help="JSON file; '-' for none (default: benchmarks/results)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the output file's rows, and compile only what it lacks (same versions only)",
    )
    return parser.parse_args(argv)


def programs(arguments: argparse.Namespace) -> list[Program]:
    """The rows that the command line asks for."""
    if arguments.models:
        found = [
            Program(
                model=model,
                chip=chip,
                mesh=parse_sizes(arguments.mesh) if arguments.mesh else SPLITS.get(model, EIGHT),
                kind=kind,
                context=context,
                batch=arguments.batch,
                layers=arguments.layers,
            )
            for model in arguments.models
            for chip in arguments.chips
            for kind in arguments.programs
            for context in arguments.contexts
        ]
    else:
        found = default_programs()
    policy = {
        name: value
        for name in ("window", "sinks", "full_layers", "decode")
        if (value := getattr(arguments, name)) is not None
    }
    found = [dataclasses.replace(program, effort=arguments.effort, **policy) for program in found]
    wanted = arguments.only or []
    return [program for program in found if all(text in program.name for text in wanted)]


def parse_sizes(text: str) -> dict[str, int]:
    """`"fsdp=2,tensor=4"` as a dict."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.isdecimal():
            sys.exit(f"--mesh: expected sizes such as fsdp=2,tensor=4, got {text!r}")
        sizes[axis.strip()] = int(size)
    return sizes


def main() -> int:
    """Compile, print, write."""
    arguments = parse_arguments()
    chosen = programs(arguments)
    if arguments.list:
        print("\n".join(program.name for program in chosen))
        return 0
    if not chosen:
        sys.exit(f"--only: expected texts of rows that --list prints, got {arguments.only}")
    if version("libtpu") is None:
        sys.exit("libtpu is not installed: pip install -r requirements/libtpu.txt")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    rows, earlier = so_far(arguments.output) if arguments.resume else ([], [])
    done = [{key: row[key] for key in dataclasses.asdict(chosen[0])} for row in rows]
    chosen = [program for program in chosen if dataclasses.asdict(program) not in done]
    for number, program in enumerate(chosen, 1):
        with console.status(f"{number}/{len(chosen)}: {program.name}"):
            row = run(program)
        rows.append(row)
        console.print(f"{program.name:55} {verdict(row)}", highlight=False, soft_wrap=True)
        write(rows, arguments.output, earlier=earlier)
    console.print(table(rows))
    return int(any(not is_good(row) for row in rows))


def run(program: Program) -> dict[str, Any]:
    """What the compiler says of a program, compiled in a process of its own."""
    row: dict[str, Any] = {**dataclasses.asdict(program), "hbm_gib": hbm_gib(program.chip)}
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "program.txt"
        row |= compile_apart(program.planned(), text=text)
        if row.get("fits") and "num_experts" in program.config and program.kind in COUNTED:
            ratio = moe_flops_ratio(text.read_text(encoding="utf-8"), program, program.config)
            row["moe_flops_ratio"] = round(ratio, 3)
    return row


def is_good(row: dict[str, Any]) -> bool:
    """Not fitting is an answer; failing, lacking a kernel or multiplying too much is not."""
    ratio = row.get("moe_flops_ratio")
    return not row.get("error") and (ratio is None or 1.0 <= ratio <= MOST_MOE_FLOPS)


def verdict(row: dict[str, Any]) -> str:
    """Whether it fits, or by how much not, or what went wrong."""
    if row.get("error"):
        return f"FAILED: {row['error']}"
    ratio = row.get("moe_flops_ratio")
    if ratio is not None and not is_good(row):
        return f"FAILED: experts multiply {ratio:.2f} x the active ones', at most {MOST_MOE_FLOPS}"
    if not row["fits"]:
        return f"does not fit: {row['missing'] / GIB:.2f} GiB too much"
    return f"fits: {row['peak'] / GIB:.2f} of {row['hbm_gib']} GiB"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """All rows; sizes are GiB a device."""
    result = Table(title="GiB a device, from the TPU compiler; not run on a TPU")
    numbers = ("peak", "arguments", "outputs", "temporaries", "aliased")
    for name in ("model", "program", "devices", "mesh"):
        result.add_column(name, overflow="fold")
    for name in (*numbers, "of HBM", "lower s", "compile s", "CPU s", "MoE FLOPs"):
        result.add_column(name, justify="right")
    result.add_column("verdict", overflow="fold")
    for row in rows:
        mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        sizes = [f"{row[name] / GIB:.2f}" if row.get(name) is not None else "" for name in numbers]
        share = f"{row['peak'] / GIB / row['hbm_gib']:.0%}" if row.get("peak") else ""
        seconds = [
            f"{row[name]:.0f}" if name in row else "" for name in ("lower_s", "compile_s", "cpu_s")
        ]
        ratio = row.get("moe_flops_ratio")
        result.add_row(
            Path(row["model"]).name,
            f"{row['kind']} {row['context'] // 1024}k",
            row["chip"],
            mesh,
            *sizes,
            share,
            *seconds,
            "" if ratio is None else f"{ratio:.2f}",
            verdict(row).split(":")[0],
        )
    return result


def results_path(output: str | None) -> Path:
    """Of the results file."""
    return Path(output or ROOT / "benchmarks" / "results" / "aot_models.json")


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    return {name: version(name) for name in ("jax", "flax", "libtpu")}


def so_far(output: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of earlier runs that were no failures, and the commands of those runs."""
    path = results_path(output)
    if output == "-" or not path.exists():
        return [], []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["versions"] != versions():
        sys.exit(
            f"--resume: expected a file of versions {versions()}, got {found['versions']} in "
            f"{path}; run without --resume to replace it"
        )
    return [row for row in found["rows"] if is_good(row)], found["commands"]


def write(
    rows: Sequence[dict[str, Any]], output: str | None, *, earlier: Sequence[str] = ()
) -> None:
    """The results file, after each row; `earlier`: commands that made rows of it before."""
    if output == "-":
        return
    path = results_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/aot_models.py", *sys.argv[1:]])
    result = {
        "commands": list(dict.fromkeys([*earlier, command])),
        "what": "bytes a device and seconds, from the TPU compiler, not run on a TPU",
        "versions": versions(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
