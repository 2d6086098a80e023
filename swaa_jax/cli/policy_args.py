"""Attention policies on the command line, for every command that takes one."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from swaa_jax.cli.flags import flag_of
from swaa_jax.cli.parser import add_old_name, fold

if TYPE_CHECKING:
    from swaa_jax.policy import AttentionPolicy


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--policy` and the flags for its fields."""
    group = parser.add_argument_group(
        "attention policy",
        "Default: the checkpoint's attention_policy.json, else its own config. Field flags change "
        "--policy, or make a new one.",
    )
    group.add_argument(
        "--policy",
        metavar="POLICY",
        help="a name of `swaa recipes` (full, naive, ...), a .yaml or .json file, or fields: "
        "window=64,sinks=4,full_layers=1::2,decode=full",
    )
    group.add_argument(
        "--window", metavar="N", help="keys a query sees, itself included; 'full' for all"
    )
    group.add_argument("--sinks", metavar="K", help="first tokens that stay visible")
    group.add_argument(
        "--full-layers", metavar="LAYERS", help="layers that keep full attention: 1::2 or 0+3+5"
    )
    group.add_argument(
        "--decode",
        metavar="HOW",
        help="what answer tokens see: window, full (FA decode), or the layers where it is full",
    )
    others = fold(parser.add_argument_group("more of the policy"))
    others.add_argument(
        "--full-heads",
        metavar="HEADS",
        help="KV heads that keep full attention in windowed layers: 3:0+2/5:1",
    )
    others.add_argument("--tail", metavar="N", help="last prompt tokens that see everything")
    add_old_name(others, "--full-attention-tail", dest="tail")


def policy_from_args(args: argparse.Namespace) -> "AttentionPolicy | None":
    """The policy that the arguments ask for; None where none of them names one.

    Raises:
        ValueError: an unknown name, a malformed value, or fields that do not go together.
    """
    from swaa_jax.policy import AttentionPolicy, load_policy, parse_fields
    from swaa_jax.policy.text import KEYS

    flags = {key: getattr(args, key) for key in KEYS if getattr(args, key) is not None}
    if args.policy is None and not flags:
        return None
    try:
        base = AttentionPolicy() if args.policy is None else load_policy(args.policy)
    except ValueError as error:
        raise ValueError(f"--policy: {str(error).removeprefix('policy: ')}") from error
    try:
        return dataclasses.replace(base, **parse_fields(flags))
    except ValueError as error:
        field, _, said = str(error).removeprefix("policy: ").partition(":")
        typed = KEYS if args.policy is None else flags
        key = next((one for one in typed if field in (one, KEYS[one])), None)
        if key is None:
            raise
        raise ValueError(f"{flag_of(key)}:{said}") from error
