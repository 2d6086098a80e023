"""Variable tracking: RULER's `vt`, chains of assignments hidden in noise.

    VAR ABCDE = 48213        ...noise...        VAR FGHIJ = VAR ABCDE        ...noise...

Which variables have that value? All of the first chain. A worked example stands before the
question.

Source: NVIDIA/RULER `scripts/data/synthetic/variable_tracking.py`.
"""

import itertools
import random
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swaa_jax.eval.tasks.ruler import text
from swaa_jax.eval.tasks.ruler.prompts import Filler, Rendered, Renderer, RulerSample, fit_units
from swaa_jax.fields import integer

if TYPE_CHECKING:
    pass

_EXAMPLE_TOKENS, _EXAMPLE_UNITS = 500, 5
"""The example's question fills so many tokens with noise, but has so many units of it at least."""


def variable_tracking(
    renderer: Renderer,
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    num_chains: int = 1,
    num_hops: int = 4,
) -> list[RulerSample]:
    """Samples of variable tracking.

    Args:
        renderer: makes the prompts; see `Renderer.of`.
        num_samples: how many; sample i does not depend on it.
        target_length: tokens of the whole prompt, the example included. Met within 1% and never
            exceeded.
        seed: of names, values, places and the example.
        num_chains: chains hidden; the first one is asked for.
        num_hops: assignments of a chain after the first: it has one variable more.

    Raises:
        ValueError: counts below 1, or a target too short for the example and the question.
    """
    integer(least=1)("num_chains", num_chains)
    integer(least=1)("num_hops", num_hops)
    integer(least=0)("num_samples", num_samples)
    return [
        _sample(
            renderer,
            rng_seed=f"{seed}/{index}",
            target_length=target_length,
            num_chains=num_chains,
            num_hops=num_hops,
        )
        for index in range(num_samples)
    ]


def _sample(
    renderer: Renderer, *, rng_seed: str, target_length: int, num_chains: int, num_hops: int
) -> RulerSample:
    example = _example(
        renderer, random.Random(f"vt example/{rng_seed}"), num_chains, min(10, num_hops)
    )
    rng = random.Random(f"vt/{rng_seed}")
    chains, value = _chains(rng, num_chains, num_hops, letters=5)
    # Where each assignment stands, as a part of the haystack: the same at every length.
    places = [sorted(rng.random() for _ in range(num_hops + 1)) for _ in chains]
    filler = Filler(renderer, "noise", f"vt filler/{rng_seed}")
    tail = text.VT_TAIL.format(query=value)
    prefix = text.VT_ANSWER_PREFIX.format(query=value, num_v=num_hops + 1)

    def render(units: Sequence[str]) -> Rendered:
        lines = _hidden(units, chains, places)
        return renderer.render(example + text.VT_HEAD + "\n".join(lines) + tail, prefix)

    return fit_units(
        filler,
        render,
        target_length=target_length,
        hidden="its example",
        fewer="fewer chains or fewer hops",
    ).sample(
        answers=tuple(_names(chains[0])),
        keys=(),
        depths=tuple(int(100 * place) for place in places[0]),
        haystack="noise",
        question=tail.strip(),
    )


def _example(renderer: Renderer, rng: random.Random, num_chains: int, num_hops: int) -> str:
    """A question with its answer, and the empty line that RULER puts behind it."""
    chains, value = _chains(rng, num_chains, num_hops, letters=3)
    places = [sorted(rng.random() for _ in range(num_hops + 1)) for _ in chains]
    noise = " ".join(text.NOISE_SENTENCES)

    def question(num_units: int) -> str:
        context = "\n".join(_hidden([noise] * num_units, chains, places))
        asked = text.VT_TAIL.format(query=value)
        prefix = text.VT_ANSWER_PREFIX.format(query=value, num_v=num_hops + 1)
        return f"{text.VT_HEAD}{context}{asked}{prefix}"

    num_units = least = max(_EXAMPLE_UNITS, num_hops + 1)
    room = _EXAMPLE_TOKENS - renderer.count(question(least))
    num_units += max(0, room // renderer.count(f"{noise}\n"))
    while num_units > least and renderer.count(question(num_units)) > _EXAMPLE_TOKENS:
        num_units -= 1
    return f"{question(num_units)} {' '.join(_names(chains[0]))}\n\n"


def _chains(
    rng: random.Random, num_chains: int, num_hops: int, *, letters: int
) -> tuple[list[list[str]], str]:
    """Each chain's assignments, and the first chain's value; names and values differ."""
    taken: set[str] = set()
    values: set[str] = set()
    chains = []
    for _ in range(num_chains):
        names = _draw_names(rng, num_hops + 1, letters=letters, taken=taken)
        value = ""
        while not value or value in values:
            value = str(10_000 + int(rng.random() * 89_999))
        values.add(value)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        chains.append(chain)
    return chains, chains[0][0].rpartition("= ")[2]


def _draw_names(rng: random.Random, count: int, *, letters: int, taken: set[str]) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(string.ascii_uppercase[int(rng.random() * 26)] for _ in range(letters))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _names(chain: Sequence[str]) -> list[str]:
    return [assignment.split()[1] for assignment in chain]


def _hidden(
    units: Sequence[str], chains: Sequence[Sequence[str]], places: Sequence[Sequence[float]]
) -> list[str]:
    """The units with the chains' assignments before them, each chain in order, a unit apart."""
    at: dict[int, list[str]] = {}
    for chain, where in zip(chains, places, strict=True):
        # Distinct units, wherever there are enough: a chain's n-th assignment has n before it.
        spare = max(1, len(units) - len(chain) + 1)
        for number, (assignment, place) in enumerate(zip(chain, where, strict=True)):
            unit = min(int(place * spare) + number, len(units))
            at.setdefault(unit, []).append(assignment)
    lines: list[str] = []
    for index in range(len(units) + 1):
        lines += at.get(index, ())
        lines += units[index : index + 1]
    return lines
