"""Words that appear most often: RULER's `cwe` (a numbered list) and `fwe` (a coded text).

Source: NVIDIA/RULER `scripts/data/synthetic/{common_words,freq_words}_extraction.py`.
"""

import math
import random
import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swaa_jax.eval.tasks.ruler import text
from swaa_jax.eval.tasks.ruler.prompts import Rendered, Renderer, RulerSample, fit_count
from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS
from swaa_jax.fields import integer, number

if TYPE_CHECKING:
    pass

_NUM_COMMON = 10
_SHORT = 4096
"""Below so many tokens RULER repeats words less often."""
_CODED_LETTERS = 6
_NOISE = "..."
_SYLLABLES = tuple(c + v for c in "bdfghjklmnprstvz" for v in "aeiou")


def common_words(
    renderer: Renderer,
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    common_repeats: int = 30,
    uncommon_repeats: int = 3,
) -> list[RulerSample]:
    """Samples of common words extraction: which ten words of a list appear most often?

    Args:
        renderer: makes the prompts; see `Renderer.of`.
        num_samples: how many; sample i does not depend on it.
        target_length: tokens of the whole prompt, the example included. Met within 1% and never
            exceeded.
        seed: of words and their order.
        common_repeats, uncommon_repeats: how often the ten words and the others appear. Below 4,096
            tokens it is 6 times and once, as in RULER.

    Raises:
        ValueError: counts that do not tell the words apart, or a target too short.
    """
    if not 1 <= uncommon_repeats < common_repeats:
        raise ValueError(
            f"uncommon_repeats: expected 1 to {common_repeats - 1}, less than common_repeats, got "
            f"{uncommon_repeats}"
        )
    integer(least=0)("num_samples", num_samples)
    is_short = target_length < _SHORT
    repeats = (6, 1) if is_short else (common_repeats, uncommon_repeats)
    found = []
    for index in range(num_samples):
        rng = random.Random(f"cwe/{seed}/{index}")
        words = _Words(rng)
        # RULER draws the example's words and the question's from one list, apart from each other.
        first, answer = _numbered(
            rng, words.take(20 if is_short else 40), (3, 1) if is_short else (10, 3)
        )
        numbered = " ".join(f"{at}. {word}" for at, word in enumerate(answer, start=1))
        example = f"{text.CWE_HEAD}{first}{text.CWE_TAIL}{text.CWE_ANSWER_PREFIX} {numbered}\n"
        words = _Words(random.Random(f"cwe words/{seed}/{index}"))
        order = f"cwe order/{seed}/{index}"

        def render(count: int, example=example, words=words, order=order) -> Rendered:
            listed, _ = _numbered(random.Random(order), words.take(count), repeats)
            content = f"{example}{text.CWE_HEAD}{listed}{text.CWE_TAIL}"
            return renderer.render(content, text.CWE_ANSWER_PREFIX)

        rendered = fit_count(
            render, least=_NUM_COMMON + 1, target_length=target_length, what="words"
        )
        found.append(
            rendered.sample(
                answers=tuple(words.take(_NUM_COMMON)),
                keys=(),
                depths=(),
                haystack="",
                question=text.CWE_TAIL.strip(),
            )
        )
    return found


def frequent_words(
    renderer: Renderer,
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    alpha: float = 2.0,
) -> list[RulerSample]:
    """Samples of frequent words extraction: which three coded words appear most often?

    A word of rank k appears in proportion to `k ** -alpha`; the first rank is noise, "...", of
    which short prompts hold a little more, so that their length is met.

    Args:
        renderer: makes the prompts; see `Renderer.of`.
        num_samples: how many; sample i does not depend on it.
        target_length: tokens of the whole prompt. Met within 1% and never exceeded.
        seed: of words and their order.
        alpha: above 1; the larger, the more the first words stand out.

    Raises:
        ValueError: alpha not above 1, or a target too short.
    """
    number(above=1)("alpha", alpha)  # at 1 the series does not end
    integer(least=0)("num_samples", num_samples)
    found = []
    for index in range(num_samples):
        rng = random.Random(f"fwe/{seed}/{index}")
        vocabulary = [_NOISE, *_coded(rng, max(4, target_length // 50) - 1)]
        order = f"fwe order/{seed}/{index}"

        def render(count: int, padding: int = 0, vocabulary=vocabulary, order=order) -> Rendered:
            words = _zipf(vocabulary, count, alpha) + [_NOISE] * padding
            coded = " ".join(text.shuffled(random.Random(order), words))
            return renderer.render(f"{text.FWE_HEAD}{coded}{text.FWE_TAIL}", text.FWE_ANSWER_PREFIX)

        rendered = fit_count(
            render,
            least=_fewest_coded(alpha),
            target_length=target_length,
            what="coded words",
            pad=render,
        )
        found.append(
            rendered.sample(
                answers=tuple(vocabulary[1:4]),
                keys=(),
                depths=(),
                haystack="",
                question=text.FWE_TAIL.strip(),
            )
        )
    return found


class _Words:
    """Distinct words without end: the plain ones in random order, then made-up ones."""

    def __init__(self, rng: random.Random):
        self._source = self._draw(rng)
        self._drawn: list[str] = []

    def take(self, count: int) -> list[str]:
        """The first so many, the same ones at every call."""
        while len(self._drawn) < count:
            self._drawn.append(next(self._source))
        return self._drawn[:count]

    def _draw(self, rng: random.Random) -> Iterator[str]:
        plain = sorted({*ADJECTIVES, *NOUNS})
        taken = set(plain)
        yield from text.shuffled(rng, plain)
        while True:
            word = "".join(_SYLLABLES[int(rng.random() * len(_SYLLABLES))] for _ in range(3))
            if word not in taken:
                taken.add(word)
                yield word


def _numbered(
    rng: random.Random, words: Sequence[str], repeats: tuple[int, int]
) -> tuple[str, list[str]]:
    """A shuffled, numbered list in which the first ten words are the common ones; and these."""
    common, uncommon = list(words[:_NUM_COMMON]), list(words[_NUM_COMMON:])
    listed = text.shuffled(rng, common * repeats[0] + uncommon * repeats[1])
    return " ".join(f"{at}. {word}" for at, word in enumerate(listed, start=1)), common


def _coded(rng: random.Random, count: int) -> list[str]:
    """Distinct words of six random letters."""
    words: list[str] = []
    taken: set[str] = set()
    while len(words) < count:
        word = "".join(
            string.ascii_lowercase[int(rng.random() * 26)] for _ in range(_CODED_LETTERS)
        )
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _zipf(vocabulary: Sequence[str], count: int, alpha: float) -> list[str]:
    """Each word as often as its rank says: int(count * rank ** -alpha / zeta(alpha)) times."""
    from scipy.special import zeta

    ranks = np.arange(1, len(vocabulary) + 1, dtype=np.float64)
    counts = (count * ranks**-alpha / zeta(alpha)).astype(int)
    return [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]


def _fewest_coded(alpha: float) -> int:
    """A count at and above which the three frequent words stand out, each from the next.

    Where two ranks' shares differ by a whole word, cutting to whole numbers keeps them apart; the
    difference is least between the last word asked for and the next.
    """
    from scipy.special import zeta

    return math.ceil(zeta(alpha) / (4**-alpha - 5**-alpha))
