"""The longest rows that each recipe reaches on one v5e, eight v5e and eight v6e, for Qwen3-4B.

For every shipped policy (one of those that take the same memory) `swaa.plan` looks for the longest
row of one slot of the engine, and of a LoRA step, that fits: by formulas, in a minute, each row
marked so; nothing is compiled or run. With `--compile` the TPU compiler looks again at the rows
whose names hold all of the given words, and they are marked "TPU compiler": the length fits, one
step more does not. These stay in the results file when the formulas are counted again.

Several devices share a row: the engine's over `tensor`, training's over `context`; on v5e training
splits heads too, and layers' inputs wait in the host's memory, since the whole weights on each
device leave too little. No length is looked at beyond 16M tokens.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from machine import version

from swaa_jax.eval.search import recipes
from swaa_jax.plan import Plan, plan

ROOT = Path(__file__).resolve().parents[1]
MODEL = "Qwen3-4B"
V5E = {"chip": "v5e", "remat": "offload"}
CASES = (
    {"work": "serve", "chip": "v5e", "mesh": "tensor=1", "step": 4096},
    {"work": "serve", "chip": "v5e", "mesh": "tensor=8", "step": 16384},
    {"work": "serve", "chip": "v6e", "mesh": "tensor=8", "step": 16384},
    {"work": "train", **V5E, "mesh": "context=1", "step": 4096},
    {"work": "train", **V5E, "mesh": "tensor=2,context=4", "step": 32768},
    {"work": "train", "chip": "v6e", "remat": "layer", "mesh": "context=8", "step": 32768},
)
KEYS = ("recipe", "work", "chip", "mesh")
EPILOG = """\
examples:
  # formulas: a minute; the rows of earlier compiles stay
  python benchmarks/plan_reach.py

  # the TPU compiler, minutes a row (pip install -r requirements/libtpu.txt)
  python benchmarks/plan_reach.py --compile full serve v5e tensor=1
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", nargs="+", metavar="TEXT", help="rows to ask the compiler for")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument(
        "--output", default=str(ROOT / "benchmarks" / "results" / "plan_reach.json")
    )
    return parser.parse_args()


def name_of(row: dict[str, Any]) -> str:
    """As `--compile` matches it; a recipe's name is a word of it."""
    return " ".join(str(row[key]) for key in KEYS)


def alike() -> list[list[str]]:
    """Names of the recipes that take the same memory."""
    found: dict[tuple[int, int], list[str]] = {}
    for one in recipes(context=1 << 17):
        found.setdefault((one.cache_bytes, one.memory), []).append(one.name)
    return list(found.values())


def reach(recipe: str, case: dict[str, Any], *, compiles: bool) -> dict[str, Any]:
    """The longest row that fits."""
    found: Plan = plan(model=MODEL, policy=recipe, solve="context", compiles=compiles, **case)
    (largest,) = (one for one in found.figures if one.peak == found.peak)
    return {
        "policy": found.policy,
        "context": found.context if found.fits else 0,
        "found_by": found.found_by,
        "peak": found.peak,
        "has": largest.has,
        "host": largest.host,
        "tried": found.tried,
    }


def main() -> int:
    """Count, print, write."""
    arguments = parse_arguments()
    path = Path(arguments.output)
    kept = json.loads(path.read_text()) if path.exists() else {"commands": [], "rows": []}
    asked = [
        {"recipe": names[0], "alike": names[1:], **case} for case in CASES for names in alike()
    ]
    words = arguments.compile or []
    asked = [one for one in asked if all(word in name_of(one).split(" ") for word in words)]
    if arguments.list:
        sys.stdout.write("\n".join(map(name_of, asked)) + "\n")
        return 0
    if not asked:
        sys.exit(f"--compile: expected words of rows that --list prints, got {words}")
    compiles = arguments.compile is not None
    rows = {(name_of(row), row["found_by"]): row for row in kept["rows"]}
    for one in asked:
        case = {key: value for key, value in one.items() if key not in ("recipe", "alike")}
        row = {**one, **reach(one["recipe"], case, compiles=compiles)}
        rows[name_of(row), row["found_by"]] = row
        of = f"{row['peak'] / 2**30:.2f} of {row['has'] / 2**30:.2f} GiB"
        print(f"{name_of(row):64} {row['context']:>9,}  {of}  {row['found_by']}", flush=True)
        command = shlex.join(["python", "benchmarks/plan_reach.py", *sys.argv[1:]])
        result = {
            "commands": list(dict.fromkeys([*kept["commands"], command])),
            "what": "tokens of the longest row that fits; closed form: an estimate",
            "versions": {name: version(name) for name in ("jax", "flax", "libtpu")},
            "rows": list(rows.values()),
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
