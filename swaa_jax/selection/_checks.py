"""Checks of options that are no integers; `swaa_jax._policy_fields.integer` is for those."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from swaa_jax._policy_fields import describe, integer

__all__ = ["distinct_layers", "flag", "number_above", "number_from"]


def number_above(name: str, value: Any, limit: float) -> float:
    """A finite number above `limit`, or a ValueError that names the option."""
    if not _is_number(value) or value <= limit:
        raise ValueError(f"{name} must be a number above {limit:g}; got {describe(value)}.")
    return value


def number_from(name: str, value: Any, least: float) -> float:
    """A finite number of at least `least`, or a ValueError that names the option."""
    if not _is_number(value) or value < least:
        raise ValueError(f"{name} must be a number, at least {least:g}; got {describe(value)}.")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, or a ValueError that names the option."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {describe(value)}.")
    return value


def distinct_layers(name: str, value: Any) -> tuple[int, ...]:
    """Layers from 0 up, sorted, or a ValueError that names the option."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise ValueError(f"{name} must be a list of layers, as in [3, 5]; got {describe(value)}.")
    layers = [integer(f"{name}: a layer", layer, minimum=0) for layer in value]
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} must be distinct layers; got {layers}. Name each of them once.")
    return tuple(sorted(layers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
