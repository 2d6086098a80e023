"""How tokens are drawn: a flag for each field of `SamplingParams`, alike in all commands."""

import argparse
from typing import Any

from swaa_jax.cli.parser import fold


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids such as 5,6, got {text[:80]!r}"
        ) from None


_FLAGS = {
    "temperature": (float, "T", ""),
    "top_k": (int, "K", "draw among the K likeliest tokens"),
    "top_p": (float, "P", "draw among the likeliest tokens of mass P"),
    "min_p": (float, "P", "draw among tokens P times as likely as the first"),
    "repetition_penalty": (float, "X", "default 1, none"),
    "presence_penalty": (float, "X", "default 0, none"),
    "frequency_penalty": (float, "X", "default 0, none"),
    "no_repeat_ngram_size": (int, "N", "no N tokens come twice, in prompt and answer"),
    "suppress_tokens": (_ids, "IDS", "tokens that are never drawn, as in 5,6"),
}
"""Type, placeholder and help of each field; the package itself is slow to import."""

_USUAL = ("temperature", "top_k", "top_p")


def add_sampling_arguments(
    parser: argparse.ArgumentParser, group: "argparse._ArgumentGroup", *, temperature: int
) -> "argparse._ArgumentGroup":
    """Add the flags; what is not given is absent from the arguments.

    Args:
        parser: the command's.
        group: gets the usual ones.
        temperature: the command's default, for the help.

    Returns:
        The group of the other ones, which is folded.
    """
    others = fold(parser.add_argument_group("sampling"))
    for name, (kind, metavar, text) in _FLAGS.items():
        (group if name in _USUAL else others).add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=text or f"default {temperature}{'' if temperature else ', greedy'}",
        )
    return others


def sampling_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, as fields of `SamplingParams`."""
    return {name: value for name, value in vars(args).items() if name in _FLAGS}
