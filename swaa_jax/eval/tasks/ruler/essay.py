"""Generated essays: an endless run of readable, varied sentences, from a seed.

RULER fills its essay haystack with Paul Graham's essays. Those cannot be shipped, so this grammar
stands in for them: some fifty sentence patterns over a few hundred plain words. It holds no digits
and never the words of a needle's key and value, so nothing in it answers a question. The text is
ours.

Example:
    >>> import random
    >>> sentences = essay_sentences(random.Random(7))
    >>> all(next(sentences).endswith(".") for _ in range(3))
    True
"""

import random
import re
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: dict[str, tuple[str, ...]] = {
    "person": _words(
        "gardener teacher sailor baker farmer painter writer builder doctor driver student singer "
        "neighbor traveler captain shepherd carpenter librarian poet cook"
    ),
    "people": _words(
        "children neighbors farmers workers visitors students friends builders travelers writers "
        "readers families"
    ),
    "place": _words(
        "village town square station library kitchen school workshop valley beach road street "
        "museum theater farm bakehouse hallway courtyard riverbank hillside"
    ),
    "thing": _words(
        "letter book map machine wall roof window bowl box story song picture report plan tool "
        "wagon cart loaf rug notebook"
    ),
    "things": _words(
        "books letters maps stories machines songs pictures plans tools stones flowers boxes "
        "leaves shoes"
    ),
    "quality": _words(
        "useful strange pleasant familiar warm wooden careful dusty patient heavy bright quiet "
        "difficult precious beautiful simple"
    ),
    "idea": _words(
        "patience work memory music language luck trust habit practice silence knowledge weather "
        "time rest curiosity friendship"
    ),
    "did": _words(
        "carried found repaired painted described opened moved cleaned borrowed sold watched "
        "finished measured remembered ignored covered"
    ),
    "went": _words(
        "walked waited sang worked listened talked rested laughed traveled returned wandered stayed"
    ),
    "do": _words("make carry find keep repair share forget choose study enjoy"),
    "how": _words("slowly carefully quietly gladly often rarely again together alone"),
    "when": _words("morning evening afternoon winter summer spring autumn night week year"),
    "where": ("near", "behind", "beside", "inside", "outside", "above", "below", "beyond"),
}
"""The vocabulary, by the slot that takes it."""

PATTERNS: tuple[str, ...] = (
    "The {person} {did} the {thing} {where} the {place}.",
    "The {person} {did} a {quality} {thing} that {when}.",
    "The {person} {went} {how} {where} the {place}.",
    "The {people} {went} {where} the {place} until the {when} was over.",
    "The {people} {did} the {things} and {went} {how}.",
    "The {place} was {quality} and the {people} {went} there every {when}.",
    "The {thing} was {quality}.",
    "The {things} were {quality} but the {person} {did} them {how}.",
    "The {quality} {thing} stood {where} the {place} for a long time.",
    "A {person} {did} the {thing} before the {when} ended.",
    "A {quality} {thing} is better than a {quality} {thing}.",
    "A {person} can {do} the {things} without any help.",
    "In the {when} the {person} {did} the {thing}.",
    "In the {place} the {people} {did} their {things} {how}.",
    "In the {when} most {people} {do} what they {do} at home.",
    "It is easy to {do} a {thing} and hard to {do} {idea}.",
    "It is {quality} to {do} {things} with {people}.",
    "It was a {quality} {when}.",
    "It was the {person} who {did} the {quality} {thing}.",
    "Most {people} {do} {things} because they {do} {idea}.",
    "Most {things} are {quality} when the {people} {do} them {how}.",
    "Some {people} {do} {idea} and others {do} {things}.",
    "Some of the {things} were left {where} the {place}.",
    "When the {person} came home the {place} was {quality}.",
    "When {people} {do} {idea} they also {do} {idea}.",
    "Every {when} the {person} {did} the {thing} {where} the {place}.",
    "Every {person} should {do} a {quality} {thing}.",
    "Nobody {did} the {thing}.",
    "Nobody in the {place} knew why the {person} {did} the {thing}.",
    "If {people} {do} {idea} then {idea} will follow.",
    "If the {thing} is {quality} then the {person} will {do} it.",
    "They {went} {how} and {did} the {things}.",
    "They said that {idea} is more {quality} than {idea}.",
    "She {did} the {thing} {how}.",
    "She {went} {where} the {place} with a {quality} {thing}.",
    "He {did} the {things} {where} the {place}.",
    "He said that the {thing} was {quality} and {went} {how}.",
    "We {do} {things} so that we can {do} {idea}.",
    "We often think about {idea} in the {when}.",
    "Without {idea} the {people} would never {do} the {things}.",
    "After the {when} the {person} {went} to the {place} {how}.",
    "Before that {when} the {people} {did} only {things}.",
    "People who {do} {idea} {how} {do} better {things}.",
    "There is no {idea} without {idea}.",
    "There was a {thing} {where} the {place} and a {person} {did} it.",
    "Perhaps {idea} is only another kind of {idea}.",
    "Later the {person} {did} the {quality} {things} as well.",
    "Still the {people} {went} {how}.",
    "But {idea} is not the same as {idea}.",
    "And so the {person} {went} {how} to the {place}.",
)
"""Sentence patterns; `{slot}` takes a word of `WORDS[slot]`, anew at each place."""

_SLOT = re.compile(r"\{(\w+)\}")


def essay_sentence(rng: random.Random) -> str:
    """One sentence of the grammar, drawn from `rng`."""
    return _SLOT.sub(lambda match: _pick(rng, WORDS[match[1]]), _pick(rng, PATTERNS))


def essay_sentences(rng: random.Random) -> Iterator[str]:
    """An endless essay: sentences without separators, none twice within twenty."""
    recent: list[str] = []
    while True:
        sentence = essay_sentence(rng)
        if sentence in recent:
            continue
        recent = [*recent[-19:], sentence]
        yield sentence


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    """`random.choice` by way of `random.random`, whose stream Python promises to keep."""
    return options[int(rng.random() * len(options))]
