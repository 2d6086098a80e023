"""Checks of a config's fields."""

from typing import Any


def check_one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise ValueError unless the value is one of the known ones."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")


def check_range(
    name: str,
    value: Any,
    *,
    least: float | int | None = None,
    most: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
) -> None:
    """Raise ValueError unless the value is a number within the limits."""
    limits = [
        (least, "at least", lambda limit: value >= limit),
        (most, "at most", lambda limit: value <= limit),
        (above, "more than", lambda limit: value > limit),
        (below, "less than", lambda limit: value < limit),
    ]
    named = [(words, limit, holds) for limit, words, holds in limits if limit is not None]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not all(holds(limit) for _, limit, holds in named):
        wanted = " and ".join(f"{words} {limit:g}" for words, limit, _ in named)
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")
