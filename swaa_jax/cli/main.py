"""`swaa`: the sub-commands are the modules beside this one that have `add_parser`."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import swaa_jax
import swaa_jax.cli
from swaa_jax.cli.errors import run_command

_DESCRIPTION = """\
Run language models under sliding-window attention, and see what it costs and what it keeps.

  swaa generate tiny-retriever "..."        answer a prompt with the small model that is shipped
  swaa COMMAND --help                       what a command does, with examples

A mistake is told in one paragraph, with exit code 2; SWAA_TRACEBACK=1 shows where it came up.
"""


class _WholeFlags(argparse.ArgumentParser):
    """Takes no abbreviated flags: an abbreviation may be another flag's tomorrow."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "allow_abbrev": False})


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. No command is imported further than its arguments need."""
    parser = argparse.ArgumentParser(
        prog="swaa",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swaa {swaa_jax.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_WholeFlags
    )
    for module in sorted(info.name for info in pkgutil.iter_modules(swaa_jax.cli.__path__)):
        if module != "main":
            commands = importlib.import_module(f"swaa_jax.cli.{module}")
            if hasattr(commands, "add_parser"):
                commands.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `swaa` with these arguments (default: the process's) and give the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "forwarded"):
        args.forwarded = rest  # another program's arguments
    elif hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes no positional arguments after a flag
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help()
        return 0
    return run_command(lambda: args.run(args), name=f"swaa {args.command}")


if __name__ == "__main__":
    sys.exit(main())
