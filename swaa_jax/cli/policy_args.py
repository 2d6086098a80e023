"""Attention policies on the command line, for every command that takes one."""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swaa_jax.policy import AttentionPolicy

_FIELDS = {
    "window": "window",
    "sinks": "num_sink_tokens",
    "num_sink_tokens": "num_sink_tokens",
    "full_layers": "full_attention_layers",
    "full_attention_layers": "full_attention_layers",
    "heads": "full_attention_heads",
    "full_heads": "full_attention_heads",
    "full_attention_heads": "full_attention_heads",
    "decode": "decode",
    "tail": "full_attention_tail",
    "full_attention_tail": "full_attention_tail",
}


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--policy` and the flags for its fields."""
    group = parser.add_argument_group(
        "attention policy",
        "Default: the checkpoint's attention_policy.json, else its own config. With field flags "
        "alone, what they leave out is as in a new policy; beside --policy they change it.",
    )
    group.add_argument(
        "--policy",
        metavar="POLICY",
        help="a shipped name (full, naive, ...), a .yaml or .json file, or fields: "
        "window=64,sinks=4,full_layers=1::2,heads=0:1+3,decode=full",
    )
    group.add_argument(
        "--window", metavar="N", help="keys a query sees, itself included; 'full' for all"
    )
    group.add_argument("--sinks", metavar="K", help="first tokens that stay visible")
    group.add_argument(
        "--full-layers", metavar="LAYERS", help="layers that keep full attention: 1::2 or 0,3,5"
    )
    group.add_argument(
        "--full-heads",
        metavar="HEADS",
        help="KV heads that keep full attention in windowed layers: 3:0+2,5:1",
    )
    group.add_argument(
        "--decode",
        metavar="HOW",
        help="what answer tokens see: window, full (FA decode), or the layers where it is full",
    )
    group.add_argument(
        "--full-attention-tail", metavar="N", help="last prompt tokens that see everything"
    )


def policy_from_args(args: argparse.Namespace) -> "AttentionPolicy | None":
    """The policy that the arguments ask for; None where they do not speak of it.

    Raises:
        ValueError: an unknown name, a malformed value, or fields that do not go together.
    """
    from swaa_jax.policy import AttentionPolicy

    flags = {
        name: value
        for name, value in (
            ("window", args.window),
            ("sinks", args.sinks),
            ("full_layers", args.full_layers),
            ("full_heads", args.full_heads),
            ("decode", args.decode),
            ("full_attention_tail", args.full_attention_tail),
        )
        if value is not None
    }
    if args.policy is None and not flags:
        return None
    base = AttentionPolicy() if args.policy is None else parse_policy(args.policy)
    return dataclasses.replace(base, **_fields(flags)) if flags else base


def parse_policy(text: str) -> "AttentionPolicy":
    """A policy from a shipped name, a file, or fields written inline.

    >>> print(parse_policy("window=64,sinks=4,full_layers=1,3,decode=full"))
    window 64 + 4 sinks, full layers 1,3, FA decode
    >>> print(parse_policy("window=64,heads=3:0+2,5:1"))
    window 64, full heads 3:0+2,5:1

    Raises:
        ValueError: an unknown name or field, or a malformed value.
        FileNotFoundError: no such file.
    """
    from swaa_jax.configs import load_policy
    from swaa_jax.policy import AttentionPolicy

    if "=" not in text or os.path.exists(text):
        return load_policy(text)
    fields: dict[str, str] = {}
    name = None
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if equals:
            name = key.strip().replace("-", "_")
            if name in fields:
                raise ValueError(f"policy: expected each field once, got {name} twice in {text!r}")
            fields[name] = value.strip()
        elif name is None:
            raise ValueError(f"policy: expected NAME=VALUE,NAME=VALUE,... got {text!r}")
        else:  # lists of layers have commas of their own: full_layers=1,3,5
            fields[name] += f",{part.strip()}"
    return AttentionPolicy(**_fields(fields))


def _fields(texts: dict[str, str]) -> dict[str, Any]:
    unknown = [name for name in texts if name not in _FIELDS]
    if unknown:
        raise ValueError(f"policy: expected fields among {', '.join(_FIELDS)}; got {unknown[0]!r}")
    return {_FIELDS[name]: _value(name, text) for name, text in texts.items()}


def _value(name: str, text: str) -> Any:
    field = _FIELDS[name]
    if field == "decode" and text in ("window", "full"):
        return text
    if field == "window" and text in ("full", "none"):
        return None
    if field == "full_attention_heads":
        return () if text in ("", "none") else _heads(name, text)
    if field in ("decode", "full_attention_layers"):
        if text in ("", "none"):
            return ()
        if ":" in text:
            return text
        expected = "layers such as 1::2 or 0,3,5" + (
            ", window or full" if field == "decode" else ""
        )
        return tuple(_integer(name, part, expected) for part in text.split(","))
    return _integer(name, text)


def _heads(name: str, text: str) -> list[tuple[int, tuple[int, ...]]]:
    """Pairs of a layer and its heads from `3:0+2,5:1`; the policy checks them."""
    pairs = []
    for part in text.split(","):
        layer, colon, heads = part.partition(":")
        if not colon:
            raise ValueError(
                f"policy: {name}: expected LAYER:HEAD+HEAD,... such as 3:0+2,5:1; got {text!r}"
            )
        numbers = tuple(_integer(name, head) for head in heads.split("+"))
        pairs.append((_integer(name, layer), numbers))
    return pairs


def _integer(name: str, text: str, expected: str = "an integer") -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"policy: {name}: expected {expected}, got {text!r}") from None
