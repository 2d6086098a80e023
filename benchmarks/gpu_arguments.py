"""What the GPU benchmarks' command lines share: numbers are checked, and nothing given is dropped.

`--smoke` sets defaults alone: what is given beside it is taken.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def count_or_zero(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, a number above 0, got {text!r}")
    return found


def json_path(text: str) -> Path:
    """A file of results; the plot beside it has another ending."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .json, got {text!r}")
    return Path(text)


def add_results(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what becomes of the results."""
    add = parser.add_argument
    add("--output", type=json_path, help="the JSON; the plot lies beside it; default: in results/")
    add("--redraw", action="store_true", help="draw the plot of --output anew; runs nothing")
    add("--smoke", action="store_true", help="tiny; kept only with --output")


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    name: str,
    smoke: Mapping[str, Any],
) -> argparse.Namespace:
    """The arguments, with `output`: None where nothing is kept.

    Args:
        parser: with those of `add_results`.
        argv: the command line; None: this process's.
        name: of the results' file.
        smoke: other defaults, under `--smoke`.
    """
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        parser.set_defaults(**smoke)
        arguments = parser.parse_args(argv)
    elif arguments.output is None:
        arguments.output = RESULTS / f"{name}.json"
    if arguments.redraw and not (arguments.output and arguments.output.is_file()):
        parser.error(
            f"--redraw: expected results in --output, got {arguments.output}; run it without first"
        )
    return arguments
