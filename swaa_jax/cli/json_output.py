"""`--json`: what a command found, as JSON on stdout and nothing else there."""

import argparse
import json

from swaa_jax.fields import plain
from swaa_jax.tables import finite

__all__ = ["add_json", "print_json"]


def add_json(parser: "argparse._ActionsContainer", what: str) -> None:
    """Adds `--json`.

    Args:
        parser: of the command, or a group of it.
        what: is printed: ``"the table"``.
    """
    help_text = f"{what} as JSON on stdout, and nothing else there"
    parser.add_argument("--json", action="store_true", help=help_text)


def print_json(value: object) -> None:
    """Prints plain data; numbers that JSON has no word for are null."""
    print(json.dumps(finite(plain(value)), indent=1, ensure_ascii=False, default=str))
