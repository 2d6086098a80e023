"""A policy in one line: ``window=2048,sinks=10,full_layers=1::2,decode=full``.

    text     full, or KEY=VALUE,KEY=VALUE,...
    keys     window  sinks  full_layers  full_heads  decode  tail, or the fields' own names
    layers   a slice 1::2, or 0+3+-1
    heads    LAYER:HEAD+HEAD, of several layers joined by /: 3:0+2/-1:1
    decode   window, full, or layers
    none     no layers, no heads; of a window: full attention, as in window=full

The text needs no quotes in a shell and has no blanks. A + may also join fields, and a comma layers:
whatever stands before the next KEY= belongs to the last one.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swaa_jax.fields import check_keys, describe, nearest, wrong

if TYPE_CHECKING:
    from swaa_jax.policy.policy import AttentionPolicy

__all__ = ["policy_fields", "policy_text", "split_policies", "parse_fields"]

FULL = "full"
KEYS = {
    "window": "window",
    "sinks": "num_sink_tokens",
    "full_layers": "full_attention_layers",
    "full_heads": "full_attention_heads",
    "decode": "decode",
    "tail": "full_attention_tail",
}
"""The short name of each field."""

_NAMES = {**KEYS, "heads": "full_attention_heads"} | {name: name for name in KEYS.values()}
_NEXT_FIELD = re.compile(r"[,+](?=\s*[A-Za-z][A-Za-z_-]*\s*=)")
_NONE = ("", "none")


def policy_text(policy: "AttentionPolicy") -> str:
    """The text of a policy; fields that have their default are left out."""
    parts = []
    for key, name in KEYS.items():
        value = getattr(policy, name)
        if value == next(f.default for f in dataclasses.fields(policy) if f.name == name):
            continue
        if name == "full_attention_heads":
            value = "/".join(f"{layer}:{'+'.join(map(str, heads))}" for layer, heads in value)
        elif isinstance(value, tuple):
            value = "+".join(map(str, value))
        parts.append(f"{key}={value}")
    return ",".join(parts) or FULL


def policy_fields(text: str) -> dict[str, Any]:
    """The fields of a policy's text.

    Raises:
        ValueError: no such text, an unknown key or a malformed value; the policy checks the rest.
    """
    if not isinstance(text, str):
        raise wrong("policy", "full or KEY=VALUE,KEY=VALUE,...", text)
    if text.strip() == FULL:
        return {}
    found: dict[str, str] = {}
    for part in _NEXT_FIELD.split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise wrong("policy", "full or KEY=VALUE,KEY=VALUE,...", text)
        key = key.strip().replace("-", "_")
        if key in found:
            raise ValueError(f"policy: expected each field once, got {key} twice")
        found[key] = value
    return parse_fields(found)


def parse_fields(values: Mapping[str, str]) -> dict[str, Any]:
    """Fields by their own names, from keys and the texts of their values.

    Raises:
        ValueError: an unknown key (the nearest is named), a field twice, or a malformed value.

    >>> parse_fields({"sinks": "4", "full-layers": "1+3"})
    {'num_sink_tokens': 4, 'full_attention_layers': (1, 3)}
    """
    values = {key.replace("-", "_"): value for key, value in values.items()}
    check_keys("policy", values, tuple(_NAMES))
    named = {key: _NAMES[key] for key in values}
    twice = [key for key in named if list(named.values()).count(named[key]) > 1]
    if twice:
        raise ValueError(f"policy: expected each field once, got {' and '.join(twice)}")
    return {_NAMES[key]: _value(key, value.strip()) for key, value in values.items()}


def split_policies(text: str) -> list[str]:
    """The policies of a list: names, files and texts, with commas between and within them.

    An item without ``=`` that is not a number begins another policy, and so does ``window=``.

    >>> split_policies("full,window=64,sinks=4,full_layers=1,3,window=64+decode=full")
    ['full', 'window=64,sinks=4,full_layers=1,3', 'window=64+decode=full']
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        is_more = found and "=" in found[-1]
        if is_more and (re.match(r"[\d:+/-]+$|(?!window\b)[A-Za-z_-]+\s*=", part)):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _value(key: str, text: str) -> Any:
    name = _NAMES[key]
    if name == "window":
        return None if text in ("full", "none") else _integer(key, text)
    if name == "full_attention_heads":
        return () if text in _NONE else _heads(key, text)
    if name == "full_attention_layers":
        return _layers(key, text, "layers such as 1::2 or 0+3, or none")
    if name == "decode":
        expected = "window, full, none or layers such as 1::2 or 0+3"
        words = ("window", "full")
        if text not in words and (near := nearest(text, words)):
            raise ValueError(f"policy: {key}: expected {expected}, got {describe(text)}{near}")
        return text if text in words else _layers(key, text, expected)
    return _integer(key, text)


def _layers(key: str, text: str, expected: str) -> Any:
    if text in _NONE:
        return ()
    if ":" in text:
        return text
    return tuple(_integer(key, part, expected) for part in re.split("[+,]", text))


def _heads(key: str, text: str) -> list[tuple[int, tuple[int, ...]]]:
    expected = "LAYER:HEAD+HEAD such as 3:0+2, of several layers joined by / as in 3:0+2/5:1"
    pairs = []
    for part in re.split("[/,;]", text):
        layer, colon, heads = part.partition(":")
        if not colon:
            raise ValueError(f"policy: {key}: expected {expected}, got {describe(text)}")
        numbers = tuple(_integer(key, head, expected) for head in heads.split("+"))
        pairs.append((_integer(key, layer, expected), numbers))
    return pairs


def _integer(key: str, text: str, expected: str = "an integer") -> int:
    if not re.fullmatch(r"\s*[+-]?\d{1,1000}\s*", text):
        advice = "put commas between fields" if "=" in text else ""
        raise wrong(f"policy: {key}", expected, text, advice)
    return int(text)
