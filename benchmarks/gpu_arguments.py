"""What the GPU benchmarks' command lines share: numbers are checked, and nothing given is dropped.

`--smoke` sets defaults alone: what is given beside it is taken. The file in `results/` is a whole
run's: one of some cases or sides, or of other sizes, names its own.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
HOW = {"output", "redraw", "smoke", "limit", "jobs"}
"""Arguments that say how a run goes, not what it measures."""
INNER = {"part", "one", "side", "model"}
"""Of a process of a run's own; the run has checked the others."""


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


def add_cases(parser: argparse.ArgumentParser, cases: Iterable[str]) -> None:
    """What is measured: some of these, by default all."""
    known = list(cases)
    told = f"of {', '.join(known)}; default: all"
    parser.add_argument(
        "--cases", nargs="+", choices=known, default=known, metavar="CASE", help=told
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what becomes of the results."""
    add = parser.add_argument
    told = "the JSON; the plot lies beside it; default, for a whole run alone: in results/"
    add("--output", type=json_path, help=told)
    add("--redraw", action="store_true", help="draw the plot of --output anew; runs nothing")
    add("--smoke", action="store_true", help="tiny; kept only with --output")


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Names of the arguments that the command line has, be they the defaults or not."""
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), unset))
    return {name for name, x in vars(parser.parse_args(argv, blank)).items() if x is not unset}


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    name: str,
    smoke: Mapping[str, Any],
    needs: Sequence[tuple[str, str, Sequence[str]]] = (),
) -> argparse.Namespace:
    """The arguments, with `output`: None where nothing is kept.

    Args:
        parser: with those of `add_results`.
        argv: the command line; None: this process's.
        name: of the results' file.
        smoke: other defaults, under `--smoke`.
        needs: an argument, another one, and the values of that one with which the first is used.
    """
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        parser.set_defaults(**smoke)
        arguments = parser.parse_args(argv)
    named = given(parser, argv)
    if named & INNER:
        return arguments
    for argument, other, values in needs:
        if argument in named and not set(values) & set(getattr(arguments, other)):
            parser.error(
                f"{_flag(argument)}: expected {_flag(other)} with {' or '.join(values)}, got "
                f"{' '.join(getattr(arguments, other))}; it is not used there, leave it out"
            )
    if arguments.redraw and named - {"redraw", "output", "smoke"}:
        told = " ".join(sorted(map(_flag, named - {"redraw", "output", "smoke"})))
        parser.error(f"--redraw: expected --output alone beside it, got {told}; it runs nothing")
    if arguments.output is None and not arguments.smoke:
        partial = [x for x in sorted(named - HOW) if not _is_whole(parser, arguments, x)]
        if partial:
            told = " ".join(map(_flag, partial))
            parser.error(
                f"--output: expected a file for a run with {told}, got none; name one, the file in "
                "results/ is a whole run's"
            )
        arguments.output = RESULTS / f"{name}.json"
    if arguments.output is not None and not arguments.redraw:
        _check_place(parser, arguments.output)
    if arguments.redraw and not (arguments.output and arguments.output.is_file()):
        parser.error(
            f"--redraw: expected results in --output, got {arguments.output}; run it without first"
        )
    return arguments


def _check_place(parser: argparse.ArgumentParser, output: Path) -> None:
    """Ends a run before it begins that could not write its results."""
    try:
        if output.is_dir():
            raise IsADirectoryError("it is a directory")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        told = f"expected a file that can be written, got {output} ({error.strerror or error})"
        parser.error(f"--output: {told}; name another")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_whole(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, argument: str
) -> bool:
    """Whether its value is the default, or has all of it and more."""
    value, default = getattr(arguments, argument), parser.get_default(argument)
    if isinstance(value, list):
        return set(value) >= set(default)
    return value == default
