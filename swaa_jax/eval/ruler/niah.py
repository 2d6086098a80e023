"""The generator of niah_multiquery: prompts of a wanted length in tokens, for any tokenizer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swaa_jax.eval.ruler import text
from swaa_jax.eval.ruler.essay import essay_sentences

HAYSTACKS = ("noise", "needle", "essay")
"""The haystack types, in RULER's order of difficulty."""

LENGTH_TOLERANCE = 0.01
"""A prompt holds between (1 - this) * target_length and target_length tokens."""


@dataclass(frozen=True, kw_only=True)
class RulerSample:
    """One prompt with its references.

    Attributes:
        messages: the chat, one user message: what a chat template takes.
        prompt: the whole input as text: the rendered template (or the bare user text where the
            tokenizer has none) and `answer_prefix`. It is not to be templated again.
        prompt_ids: `prompt` as token ids, special tokens in place: the safest thing to generate
            from.
        answer_prefix: what `prompt` ends with in non-thinking use; empty when the model thinks
            first.
        answers: the values asked for, in the order of the question.
        keys: the keys asked for, in the order of the question; `answers[i]` belongs to `keys[i]`.
        depths: where the needles of `keys` stand, percent of the haystack, in the order of `keys`.
        num_tokens: `len(prompt_ids)`.
        haystack: "noise", "needle" or "essay".
    """

    messages: tuple[dict[str, str], ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    answer_prefix: str
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    depths: tuple[int, ...]
    num_tokens: int
    haystack: str


def niah_multiquery(
    tokenizer: Any,
    *,
    num_samples: int,
    target_length: int,
    seed: int,
    haystack: str = "essay",
    num_keys: int = 4,
    num_queries: int = 4,
    enable_thinking: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    use_chat_template: bool | None = None,
) -> list[RulerSample]:
    """Samples of RULER's multi-query needle task.

    Args:
        tokenizer: a Transformers tokenizer.
        num_samples: how many; sample i does not depend on it.
        target_length: tokens of the whole prompt: template, haystack, question and answer prefix.
            Met within 1% and never exceeded.
        seed: of keys, values, depths and filler. The same needles stand in every haystack type and
            length.
        haystack: "noise" (RULER's five sentences over and over), "needle" (other needles) or
            "essay" (generated).
        num_keys: needles hidden.
        num_queries: how many of them are asked for, in an order of their own.
        enable_thinking: passed to the chat template. When true nothing is put after the template's
            generation prompt; when false RULER's answer prefix is.
        chat_template_kwargs: more arguments for the template.
        use_chat_template: None: if the tokenizer has one.

    Raises:
        ValueError: for an unknown haystack, impossible counts, or a target too short for the
            question or for its 1%.

    Source: arXiv 2404.06654, NVIDIA/RULER `scripts/data/synthetic/niah.py`; the paper's setting
        (arXiv
    2512.10411, section 4.1) is `num_keys=4, num_queries=4, haystack="essay"`.
    """
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack: expected one of {', '.join(HAYSTACKS)}; got {haystack!r}")
    if num_samples < 0:
        raise ValueError(f"num_samples: expected 0 or more; got {num_samples}")
    if not 1 <= num_queries <= num_keys:
        raise ValueError(
            f"num_queries: expected 1 to num_keys={num_keys}; got {num_queries}. "
            "Each query asks for one key"
        )
    if use_chat_template is None:
        use_chat_template = bool(getattr(tokenizer, "chat_template", None))
    renderer = _Renderer(
        tokenizer=tokenizer,
        enable_thinking=enable_thinking,
        template_kwargs=dict(chat_template_kwargs or {}) if use_chat_template else None,
        num_queries=num_queries,
    )
    return [
        _sample(
            renderer,
            rng_seed=f"{seed}/{index}",
            target_length=target_length,
            haystack=haystack,
            num_keys=num_keys,
        )
        for index in range(num_samples)
    ]


@dataclass(frozen=True, kw_only=True)
class _Renderer:
    """From keys and a context to prompt text and ids."""

    tokenizer: Any
    enable_thinking: bool
    template_kwargs: dict[str, Any] | None  # None: no chat template
    num_queries: int

    def render(self, context: str, queries: Sequence[str]) -> tuple[list[dict[str, str]], str, str]:
        query = text.join_list(queries)
        content = text.PROMPT_HEAD + context + text.PROMPT_TAIL.format(query=query)
        messages = [{"role": "user", "content": content}]
        prefix = "" if self.enable_thinking else text.ANSWER_PREFIX.format(query=query)
        if self.template_kwargs is None:
            return messages, content + prefix, prefix
        prompt = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.enable_thinking,
            **self.template_kwargs,
        )
        return messages, prompt + prefix, prefix

    def encode(self, prompt: str) -> list[int]:
        # A rendered template brings its own BOS; bare text gets whatever the tokenizer adds.
        return self.tokenizer.encode(prompt, add_special_tokens=self.template_kwargs is None)

    def count(self, piece: str) -> int:
        return len(self.tokenizer.encode(piece, add_special_tokens=False))


def _sample(
    renderer: _Renderer, *, rng_seed: str, target_length: int, haystack: str, num_keys: int
) -> RulerSample:
    rng = random.Random(f"needles/{rng_seed}")
    taken_keys: set[str] = set()
    taken_values: set[str] = set()
    keys = text.draw_keys(rng, num_keys, taken=taken_keys)
    values = text.draw_values(rng, num_keys, taken=taken_values)
    depths = text.draw_depths(rng, num_keys)
    order = text.shuffled(rng, range(num_keys))[: renderer.num_queries]
    queries = [keys[i] for i in order]
    needles = [
        text.NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)
    ]

    filler = _Filler(renderer, haystack, f"filler/{rng_seed}", taken_keys, taken_values)
    separator = text.HAYSTACK_SEPARATORS[haystack]

    def render(units: Sequence[str]) -> tuple[list[dict[str, str]], str, str, list[int]]:
        context = separator.join(_insert(units, needles, depths))
        messages, prompt, prefix = renderer.render(context, queries)
        return messages, prompt, prefix, renderer.encode(prompt)

    shortest = len(render(())[-1])
    if shortest > target_length:
        raise ValueError(
            f"target_length: the question and {num_keys} needles alone take {shortest} tokens; got "
            f"{target_length}. Ask for a longer prompt, fewer keys or fewer queries"
        )
    # Pieces are counted one by one, which for most tokenizers is exact and for the rest a little
    # off: the whole is then counted, and the budget corrected by what it missed.
    least = target_length * (1 - LENGTH_TOLERANCE)
    budget = target_length - shortest
    for _ in range(12):
        units = filler.units(budget)
        messages, prompt, prefix, ids = render(units)
        if least <= len(ids) <= target_length:
            break
        budget += (
            min(target_length - len(ids), -1)
            if len(ids) > target_length
            else 1 + (target_length - len(ids)) // 2
        )
    else:
        raise ValueError(
            "target_length: no whole number of sentences brings the prompt within 1% below "
            f"{target_length} "
            f"tokens (the last try had {len(ids)}); ask for a longer prompt"
        )
    return RulerSample(
        messages=tuple(messages),
        prompt=prompt,
        prompt_ids=tuple(ids),
        answer_prefix=prefix,
        answers=tuple(values[i] for i in order),
        keys=tuple(queries),
        depths=tuple(depths[i] for i in order),
        num_tokens=len(ids),
        haystack=haystack,
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


class _Filler:
    """Haystack units up to a token budget; drawn once, so that a retry changes only the end."""

    def __init__(
        self, renderer: _Renderer, haystack: str, rng_seed: str, keys: set[str], values: set[str]
    ):
        self._separator = text.HAYSTACK_SEPARATORS[haystack]
        self._count = renderer.count
        self._drawn: list[tuple[str, int]] = []
        self._sizes: dict[str, int] = {}
        self._source = {"noise": self._noise, "needle": self._needles, "essay": self._essay}[
            haystack
        ](random.Random(rng_seed), keys, values)
        self._tail_separator = self._separator

    def units(self, budget: int) -> list[str]:
        """Units of `budget` tokens at most, whole sentences, as near to it as they go."""
        units: list[str] = []
        index = 0
        while True:
            if index == len(self._drawn):
                unit = next(self._source)
                self._drawn.append((unit, self._size(self._separator + unit)))
            unit, size = self._drawn[index]
            if size > budget:
                break
            units.append(unit)
            budget -= size
            index += 1
        tail = self._tail(budget)
        return [*units, tail] if tail else units

    def _tail(self, budget: int) -> str:
        """Noise sentences that fill what a whole unit no longer fits in: the largest sum wins."""
        best, best_size = "", 0
        for chosen in range(1, 1 << 2 * len(text.NOISE_SENTENCES)):
            doubled = text.NOISE_SENTENCES * 2
            picked = [s for i, s in enumerate(doubled) if chosen >> i & 1]
            size = sum(
                self._size((self._separator if i == 0 else " ") + s) for i, s in enumerate(picked)
            )
            if best_size < size <= budget:
                best, best_size = " ".join(picked), size
            if best_size == budget:
                break
        return best

    def _size(self, piece: str) -> int:
        if piece not in self._sizes:
            self._sizes[piece] = self._count(piece)
        return self._sizes[piece]

    def _noise(self, rng: random.Random, keys: set[str], values: set[str]):
        del rng, keys, values
        while True:
            yield " ".join(text.NOISE_SENTENCES)

    def _needles(self, rng: random.Random, keys: set[str], values: set[str]):
        while True:
            (key,) = text.draw_keys(rng, 1, taken=keys)
            (value,) = text.draw_values(rng, 1, taken=values)
            yield text.NEEDLE.format(key=key, value=value)

    def _essay(self, rng: random.Random, keys: set[str], values: set[str]):
        del keys, values
        yield from essay_sentences(rng)
