"""`swaa`: the sub-commands are the modules beside this one that have `add_parser`."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import swaa_jax
import swaa_jax.cli
from swaa_jax.cli.errors import run_command
from swaa_jax.fields import nearest, show

_DESCRIPTION = """\
Run language models under sliding-window attention, and see what it costs and what it keeps.

  swaa generate tiny-retriever "..."        answer a prompt with the small model that is shipped
  swaa COMMAND --help                       what a command does, with examples

A mistake is told in one paragraph, with exit code 2; SWAA_TRACEBACK=1 shows where it came up.
"""

_LONGEST_ERROR = 500  # argparse repeats a value whole


class _Parser(argparse.ArgumentParser):
    """Takes whole flags only, since an abbreviation may be another flag's tomorrow, and tells a
    mistake in one paragraph, with the flag or the word that it is near to.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "allow_abbrev": False})
        self.set_defaults(parser=self)  # the command's own: the last one to be parsed sets it

    def error(self, message: str) -> NoReturn:
        told = message if len(message) <= _LONGEST_ERROR else f"{message[:_LONGEST_ERROR]}..."
        self.exit(2, f"{self.prog}: {told}; see {self.prog} --help\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Ends with what the command does not take, each word with its near flag."""
        known = [flag for action in self._actions for flag in action.option_strings]
        near = [nearest(word.partition("=")[0], known, cutoff=0.75) for word in words[:3]]
        told = [show(word) + hint for word, hint in zip(words, near, strict=False)]
        more = ["..."] if len(words) > 3 else []
        self.error(f"expected no further arguments, got {', '.join(told + more)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            action,
            f"expected one of {', '.join(known)}, got {show(value)}{nearest(value, known)}",
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. No command is imported further than its arguments need."""
    parser = _Parser(
        prog="swaa",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swaa {swaa_jax.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
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
    elif rest:
        # argparse takes no more positional arguments once a flag has come between.
        several = [vars(args)[name] for name in ("overrides", "prompts") if name in args]
        if not several or any(word.startswith("-") for word in rest):
            args.parser.refuse(rest)
        several[0].extend(rest)
    if args.command is None:
        parser.print_help()
        return 0
    return run_command(lambda: args.run(args), name=f"swaa {args.command}")


if __name__ == "__main__":
    sys.exit(main())
