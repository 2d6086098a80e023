"""RULER's wording of the needle task, to the letter, and the drawing of keys, values and depths.

One place for the sentences, so that evaluation and the tiny-retriever's training data cannot drift
apart. Source: NVIDIA/RULER, `scripts/data/synthetic/{constants,niah}.py`.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

from swaa_jax.eval.ruler.words import ADJECTIVES, NOUNS

T = TypeVar("T")

PROMPT_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
"""What stands before the haystack."""

PROMPT_TAIL = "\nWhat are all the special magic numbers for {query} mentioned in the provided text?"
"""What stands after the haystack; `{query}` is `join_list(keys)`."""

ANSWER_PREFIX = " The special magic numbers for {query} mentioned in the provided text are"
"""The start of the answer, put at the prompt's end where the model does not think first."""

NEEDLE = "One of the special magic numbers for {key} is: {value}."
"""A needle, and a distractor of the needle haystack."""

NOISE_SENTENCES: tuple[str, ...] = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""The noise haystack's unit is these five in order, joined by spaces, one unit a line."""

DEPTHS: tuple[int, ...] = tuple(round(100 * i / 39) for i in range(40))
"""RULER's depth grid: 40 points over 0..100 percent of the haystack."""

HAYSTACK_SEPARATORS: dict[str, str] = {"noise": "\n", "needle": "\n", "essay": " "}
"""Haystack type to what joins its units and needles (RULER: lines; an essay is one paragraph)."""


def join_list(items: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: RULER's list of queries.

    Example:
        >>> join_list(["a", "b", "c"])
        'a, b, and c'
    """
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + ", and " + items[-1]


def draw_keys(rng: random.Random, count: int, *, taken: set[str] | None = None) -> list[str]:
    """`count` distinct `adjective-noun` keys, distinct from `taken`, which grows by them."""
    taken = set() if taken is None else taken
    room = len(ADJECTIVES) * len(NOUNS) - len(taken)
    if count > room:
        raise ValueError(
            f"num_keys: the word lists make {len(ADJECTIVES) * len(NOUNS)} distinct keys and "
            f"{count} more were asked for with {len(taken)} in use; ask for a shorter "
            "needle haystack or fewer keys"
        )
    keys: list[str] = []
    while len(keys) < count:
        key = f"{ADJECTIVES[_below(rng, len(ADJECTIVES))]}-{NOUNS[_below(rng, len(NOUNS))]}"
        if key not in taken:
            taken.add(key)
            keys.append(key)
    return keys


def draw_values(rng: random.Random, count: int, *, taken: set[str] | None = None) -> list[str]:
    """`count` distinct seven-digit numbers without leading zero, distinct from `taken`."""
    taken = set() if taken is None else taken
    values: list[str] = []
    while len(values) < count:
        value = str(1_000_000 + _below(rng, 9_000_000))
        if value not in taken:
            taken.add(value)
            values.append(value)
    return values


def draw_depths(rng: random.Random, count: int) -> list[int]:
    """`count` points of the depth grid in random order; distinct until the grid is used up."""
    depths: list[int] = []
    while len(depths) < count:
        depths += shuffled(rng, DEPTHS)[: count - len(depths)]
    return depths


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """A shuffled copy, by `random.random` alone, whose stream Python promises to keep."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = _below(rng, i + 1)
        out[i], out[j] = out[j], out[i]
    return out


def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)
