"""`swaa`: the sub-commands are the modules beside this one that have `add_parser`."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import swaa_jax
import swaa_jax.cli
from swaa_jax.cli.environment import unknown_variables
from swaa_jax.cli.errors import run_command
from swaa_jax.cli.parser import RootParser

_DESCRIPTION = (
    "Run language models under sliding-window attention, and see what it costs and what it keeps."
)
_EPILOG = """\
  swaa demo                    scores policies on the small model that is shipped
  swaa COMMAND --help          what a command does, with examples; --help-all has all flags

A mistake is told in one paragraph, with exit code 2; SWAA_TRACEBACK=1 shows where it came up.
"""

KINDS = {
    "run": ("generate", "demo"),
    "choose": ("recipes", "plan", "eval", "select", "lm-eval"),
    "adapt": ("distill", "train", "convert"),
    "serve": ("serve",),
    "check": ("bench", "verify", "doctor", "completion"),
}
"""The commands by what people do with them."""

_QUIET = ("completion", "doctor")  # a shell reads the one, and the other tells of them itself


def build_parser() -> RootParser:
    """The parser of all commands. No command is imported further than its arguments need."""
    parser = RootParser(prog="swaa", description=_DESCRIPTION, epilog=_EPILOG, kinds=KINDS)
    parser.add_argument("--version", action="version", version=f"swaa {swaa_jax.__version__}")
    for module in sorted(info.name for info in pkgutil.iter_modules(swaa_jax.cli.__path__)):
        if module != "main":
            commands = importlib.import_module(f"swaa_jax.cli.{module}")
            if hasattr(commands, "add_parser"):
                commands.add_parser(parser.commands)
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
    if args.command not in _QUIET:
        for told in unknown_variables():
            print(f"swaa {args.command}: {told}", file=sys.stderr)
    return run_command(lambda: args.run(args), name=f"swaa {args.command}")


if __name__ == "__main__":
    sys.exit(main())
