"""RULER's wording, to the letter, and the drawing of keys, values and depths.

One place for the sentences, so that evaluation and the tiny-retriever's training data cannot drift
apart. Source: NVIDIA/RULER, `scripts/data/synthetic/{constants,niah,variable_tracking}.py`.
"""

import dataclasses
import random
import uuid
from collections.abc import Sequence
from typing import TypeVar

from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS

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


VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_TAIL = "\nQuestion: Find all variables that are assigned the value {query} in the text above."
VT_ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: "
)
"""Variable tracking; `{query}` is the value, `{num_v}` how many variables have it."""

CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_TAIL = "\nQuestion: What are the 10 most common words in the above list?"
CWE_ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
"""Common words."""

FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
FWE_TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FWE_ANSWER_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
"""Frequent words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleWording:
    """The needle tasks' sentences: as `PROMPT_HEAD`, `PROMPT_TAIL`, `ANSWER_PREFIX`, `NEEDLE`."""

    head: str
    tail: str
    answer_prefix: str
    needle: str


def needle_wording(kind: str, *, several: bool) -> NeedleWording:
    """The sentences for values of a kind ("numbers", "words", "uuids"), asked for one or several.

    RULER's rule for a single one: "Some" becomes "A", "are all" and "are" become "is", and the kind
    loses its s.

    Example:
        >>> print(needle_wording("uuids", several=False).tail.strip())
        What is the special magic uuid for {query} mentioned in the provided text?
    """
    parts = {"head": PROMPT_HEAD, "tail": PROMPT_TAIL, "answer_prefix": ANSWER_PREFIX}
    for name, sentence in parts.items():
        asked = kind
        if not several:
            asked = kind.removesuffix("s")
            for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
                sentence = sentence.replace(plural, singular)
        parts[name] = sentence.replace("numbers", asked)
    return NeedleWording(needle=NEEDLE.replace("numbers", kind), **parts)


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


def draw_uuids(rng: random.Random, count: int, *, taken: set[str] | None = None) -> list[str]:
    """`count` distinct version-4 UUIDs, distinct from `taken`, which grows by them."""
    taken = set() if taken is None else taken
    found: list[str] = []
    while len(found) < count:
        number = 0
        for _ in range(8):
            number = number << 16 | _below(rng, 1 << 16)
        value = str(uuid.UUID(int=number, version=4))
        if value not in taken:
            taken.add(value)
            found.append(value)
    return found


def draw(rng: random.Random, kind: str, count: int, *, taken: set[str] | None = None) -> list[str]:
    """`count` distinct "words", "numbers" or "uuids", distinct from `taken`."""
    drawing = {"words": draw_keys, "numbers": draw_values, "uuids": draw_uuids}[kind]
    return drawing(rng, count, taken=taken)


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


def sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, each at most once, in random order."""
    return shuffled(rng, items)[:count]


def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)
