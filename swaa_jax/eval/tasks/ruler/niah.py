"""Needles in a haystack: RULER's eight `niah_*` tasks, for any tokenizer.

Source: arXiv 2404.06654, NVIDIA/RULER `scripts/data/synthetic/niah.py`, `scripts/synthetic.yaml`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaa_jax.eval.tasks.ruler import text
from swaa_jax.eval.tasks.ruler.prompts import (
    HAYSTACKS,
    Filler,
    Rendered,
    Renderer,
    RulerSample,
    fit_units,
)
from swaa_jax.fields import check_fields, integer, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLE_KINDS = ("words", "numbers", "uuids")
"""What keys and values can be: `adjective-noun`, seven digits, or a version-4 UUID."""


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    """One of RULER's needle tasks.

    Attributes:
        haystack: "noise" (RULER's five sentences over and over), "needle" (other needles) or
            "essay" (generated).
        key_kind, value_kind: of `NEEDLE_KINDS`.
        num_keys: keys hidden.
        num_values: values of each key, a needle each.
        num_queries: keys asked for, in an order of their own.

    Raises:
        ValueError: an unknown haystack or kind, or impossible counts.
    """

    haystack: str = "essay"
    key_kind: str = "words"
    value_kind: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __post_init__(self):
        check_fields(
            self,
            haystack=one_of(*HAYSTACKS),
            key_kind=one_of(*NEEDLE_KINDS),
            value_kind=one_of(*NEEDLE_KINDS),
            num_values=integer(least=1),
        )
        if not 1 <= self.num_queries <= self.num_keys:
            raise ValueError(
                f"num_queries: expected 1 to num_keys={self.num_keys}, got {self.num_queries}; "
                "each query asks for one key"
            )


NIAH_TASKS: Mapping[str, NiahConfig] = {
    "niah_single_1": NiahConfig(haystack="noise"),
    "niah_single_2": NiahConfig(),
    "niah_single_3": NiahConfig(value_kind="uuids"),
    "niah_multikey_1": NiahConfig(num_keys=4),
    "niah_multikey_2": NiahConfig(haystack="needle"),
    "niah_multikey_3": NiahConfig(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NiahConfig(num_values=4),
    "niah_multiquery": NiahConfig(num_keys=4, num_queries=4),
}
"""RULER's tasks by name."""


def niah(
    renderer: Renderer,
    config: NiahConfig,
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    always_plural: bool = False,
) -> list[RulerSample]:
    """Samples of a needle task.

    Args:
        renderer: makes the prompts; see `Renderer.of`.
        config: which task.
        num_samples: how many; sample i does not depend on it.
        target_length: tokens of the whole prompt: template, haystack, question and answer prefix.
            Met within 1% and never exceeded.
        seed: of keys, values, depths and filler. The same needles stand in every haystack type and
            length.
        always_plural: word a question for a single value as RULER words those for several.

    Raises:
        ValueError: fewer than 0 samples, or a target too short for the question or for its 1%.
    """
    integer(least=0)("num_samples", num_samples)
    several = always_plural or config.num_queries * config.num_values > 1
    wording = text.needle_wording(config.value_kind, several=several)
    return [
        _sample(renderer, config, wording, rng_seed=f"{seed}/{index}", target_length=target_length)
        for index in range(num_samples)
    ]


def niah_multiquery(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    haystack: str = "essay",
    num_keys: int = 4,
    num_queries: int = 4,
    enable_thinking: bool = False,
    chat_template_kwargs: Mapping[str, object] | None = None,
    use_chat_template: bool | None = None,
) -> list[RulerSample]:
    """Samples of RULER's multi-query task, worded for several values whatever `num_queries` is.

    The SWAA paper's setting (arXiv 2512.10411, section 4.1) is the default. Arguments and errors
    are those of `NiahConfig`, `Renderer.of` and `niah`.
    """
    renderer = Renderer.of(
        tokenizer,
        enable_thinking=enable_thinking,
        chat_template_kwargs=chat_template_kwargs,
        use_chat_template=use_chat_template,
    )
    return niah(
        renderer,
        NiahConfig(haystack=haystack, num_keys=num_keys, num_queries=num_queries),
        num_samples=num_samples,
        target_length=target_length,
        seed=seed,
        always_plural=True,
    )


def _sample(
    renderer: Renderer,
    config: NiahConfig,
    wording: text.NeedleWording,
    *,
    rng_seed: str,
    target_length: int,
) -> RulerSample:
    rng = random.Random(f"needles/{rng_seed}")
    taken_keys: set[str] = set()
    taken_values: set[str] = set()
    num_needles = config.num_keys * config.num_values
    keys = text.draw(rng, config.key_kind, config.num_keys, taken=taken_keys)
    values = text.draw(rng, config.value_kind, num_needles, taken=taken_values)
    depths = text.draw_depths(rng, num_needles)
    order = text.shuffled(rng, range(config.num_keys))[: config.num_queries]
    of_key = [
        range(i * config.num_values, (i + 1) * config.num_values) for i in range(config.num_keys)
    ]
    needles = [
        wording.needle.format(key=keys[i], value=values[at])
        for i in range(config.num_keys)
        for at in of_key[i]
    ]
    query = text.join_list([keys[i] for i in order])

    def distractor(rng: random.Random) -> str:
        (key,) = text.draw(rng, config.key_kind, 1, taken=taken_keys)
        (value,) = text.draw(rng, config.value_kind, 1, taken=taken_values)
        return wording.needle.format(key=key, value=value)

    filler = Filler(renderer, config.haystack, f"filler/{rng_seed}", distractor=distractor)
    separator = text.HAYSTACK_SEPARATORS[config.haystack]

    def render(units: Sequence[str]) -> Rendered:
        context = separator.join(_insert(units, needles, depths))
        content = wording.head + context + wording.tail.format(query=query)
        return renderer.render(content, wording.answer_prefix.format(query=query))

    asked = [at for i in order for at in of_key[i]]
    return fit_units(
        filler,
        render,
        target_length=target_length,
        hidden=f"{num_needles} needle{'s' if num_needles > 1 else ''}",
        fewer="fewer keys or fewer queries",
    ).sample(
        answers=tuple(values[at] for at in asked),
        keys=tuple(keys[i] for i in order),
        depths=tuple(depths[at] for at in asked),
        haystack=config.haystack,
        question=wording.tail.format(query=query).strip(),
    )


def _insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> list[str]:
    """Puts each needle before unit int(len(units) * depth / 100), as RULER does for essays."""
    placed: dict[int, list[str]] = {}
    for depth, needle in sorted(zip(depths, needles, strict=True)):
        placed.setdefault(int(len(units) * depth / 100), []).append(needle)
    out: list[str] = []
    for index in range(len(units) + 1):
        out += placed.get(index, ())
        out += units[index : index + 1]
    return out
