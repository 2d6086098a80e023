"""What every RULER task shares: samples, rendering, and prompts of a wanted length in tokens."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from swaa_jax.chats import render_chat
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.tasks.ruler import text
from swaa_jax.eval.tasks.ruler.essay import essay_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HAYSTACKS = ("noise", "needle", "essay")
"""The haystack types, in RULER's order of difficulty."""

LENGTH_TOLERANCE = 0.01
"""A prompt holds between (1 - this) * target_length and target_length tokens."""

_TRIES = 12


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
        answers: what is asked for; of needles in the order of the question.
        keys: of needles: those asked for, in the order of the question, each once.
        depths: of needles: where those of `keys` stand, percent of the haystack, in their order.
        num_tokens: `len(prompt_ids)`.
        haystack: "noise", "needle" or "essay"; "" for lists of words.
        question: the prompt's last sentence, which asks.
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
    question: str


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A prompt as text and as ids."""

    messages: tuple[dict[str, str], ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    answer_prefix: str

    def sample(self, **fields: Any) -> RulerSample:
        """The sample that this is the prompt of."""
        return RulerSample(
            messages=self.messages,
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
            answer_prefix=self.answer_prefix,
            num_tokens=len(self.prompt_ids),
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """From a user's text to a prompt, by a tokenizer and its chat template.

    Attributes:
        tokenizer: a Transformers tokenizer.
        enable_thinking: passed to the template.
        template_kwargs: more arguments for the template; None: no template.
        thinks: the answer's prefix is left out, since the model thinks first: it is asked to, or
            the template opens a thought in either mode.
    """

    tokenizer: "PreTrainedTokenizerBase"
    enable_thinking: bool
    template_kwargs: dict[str, Any] | None
    thinks: bool

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        enable_thinking: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
        use_chat_template: bool | None = None,
    ) -> "Renderer":
        """A renderer for a tokenizer.

        Args:
            tokenizer: a Transformers tokenizer.
            enable_thinking: passed to the chat template. When true nothing is put after the
                template's generation prompt; when false RULER's answer prefix is, unless the
                template opens a thought all the same.
            chat_template_kwargs: more arguments for the template.
            use_chat_template: None: if the tokenizer has one.
        """
        if use_chat_template is None:
            use_chat_template = bool(getattr(tokenizer, "chat_template", None))
        renderer = cls(
            tokenizer=tokenizer,
            enable_thinking=enable_thinking,
            template_kwargs=dict(chat_template_kwargs or {}) if use_chat_template else None,
            thinks=enable_thinking,
        )
        if enable_thinking or not use_chat_template:
            return renderer
        return replace(renderer, thinks=opens_thinking(tokenizer, renderer.render("Q", "").prompt))

    def render(self, content: str, answer_prefix: str) -> Rendered:
        """The prompt of a user's text."""
        messages = [{"role": "user", "content": content}]
        prefix = "" if self.thinks else answer_prefix
        if self.template_kwargs is None:
            prompt = content + prefix
        else:
            variables = {"enable_thinking": self.enable_thinking, **self.template_kwargs}
            prompt = render_chat(self.tokenizer, messages, variables=variables).text + prefix
        # A rendered template brings its own BOS; bare text gets whatever the tokenizer adds.
        ids = self.tokenizer.encode(prompt, add_special_tokens=self.template_kwargs is None)
        return Rendered(
            messages=tuple(messages),
            prompt=prompt,
            prompt_ids=tuple(ids),
            answer_prefix=prefix,
        )

    def count(self, piece: str) -> int:
        """Tokens of a piece of text by itself."""
        return len(self.tokenizer.encode(piece, add_special_tokens=False))


def fit_units(
    filler: "Filler",
    render: Callable[[Sequence[str]], Rendered],
    *,
    target_length: int,
    hidden: str,
    fewer: str,
) -> Rendered:
    """The prompt whose haystack units bring it within 1% below `target_length` tokens.

    Args:
        filler: makes the units.
        render: the prompt with these units.
        target_length: tokens of the whole prompt.
        hidden, fewer: what stands in it besides the question, and what to ask less of; for errors.

    Raises:
        ValueError: the question alone is longer, or no whole number of sentences meets it.
    """
    shortest = len(render(()).prompt_ids)
    if shortest > target_length:
        raise ValueError(
            f"length: expected more than the question and {hidden} alone take, {shortest} tokens, "
            f"got {target_length}; ask for a longer prompt, {fewer}"
        )
    # Pieces are counted one by one, which for most tokenizers is exact and for the rest a little
    # off: the whole is then counted, and the budget corrected by what it missed. In short prompts
    # what the last unit leaves may be less than any sentence: then one or two fewer are tried.
    least = target_length * (1 - LENGTH_TOLERANCE)
    size = 0
    for dropped in range(3):
        budget = target_length - shortest
        for _ in range(_TRIES):
            rendered = render(filler.units(budget, dropped=dropped))
            size = len(rendered.prompt_ids)
            if least <= size <= target_length:
                return rendered
            missing = target_length - size
            budget += min(missing, -1) if missing < 0 else 1 + missing // 2
    raise ValueError(
        "target_length: no whole number of sentences brings the prompt within 1% below "
        f"{target_length} tokens (the last try had {size}); ask for a longer prompt"
    )


def fit_count(
    render: Callable[[int], Rendered],
    *,
    least: int,
    target_length: int,
    what: str,
    pad: Callable[[int, int], Rendered] | None = None,
) -> Rendered:
    """The prompt with as many words as bring it within 1% below `target_length` tokens.

    Args:
        render: the prompt with so many words; more words make it longer, about in proportion.
        least: the fewest words that the task can do with.
        target_length: tokens of the whole prompt.
        what: the words, for messages.
        pad: the prompt with so many words and so much padding, a token or a few each: for words
            that come several at once.

    Raises:
        ValueError: even the fewest words are too many, or no number of them meets the length.
    """
    low, rendered = least, render(least)
    size = len(rendered.prompt_ids)
    if size > target_length:
        raise ValueError(
            f"length: expected more than {least} {what} alone take, {size} tokens, got "
            f"{target_length}; ask for a longer prompt"
        )
    high = None  # the fewest words that are known to be too many
    while size < target_length * (1 - LENGTH_TOLERANCE):
        # What the words so far took tells how many more will do; bounds keep it from going astray.
        guess = low + max(1, (target_length - size) * low // (2 * size))
        if high is not None:
            guess = min(guess, (low + high) // 2)
        if guess == low:
            break
        tried = render(guess)
        if len(tried.prompt_ids) > target_length:
            high = guess
        else:
            low, rendered, size = guess, tried, len(tried.prompt_ids)
    if pad is not None:
        for padding in range(1, 1 + target_length - size):
            if size >= target_length * (1 - LENGTH_TOLERANCE):
                break
            rendered = pad(low, padding)
            size = len(rendered.prompt_ids)
    if not target_length * (1 - LENGTH_TOLERANCE) <= size <= target_length:
        raise ValueError(
            f"target_length: no number of {what} brings the prompt within 1% below "
            f"{target_length} tokens ({low} take {size}); ask for a longer prompt"
        )
    return rendered


class Filler:
    """Haystack units up to a token budget; drawn once, so that a retry changes only the end.

    Args:
        renderer: counts tokens.
        haystack: one of `HAYSTACKS`.
        rng_seed: of what is drawn.
        distractor: draws the needle haystack's next needle.
    """

    def __init__(
        self,
        renderer: Renderer,
        haystack: str,
        rng_seed: str,
        *,
        distractor: Callable[[random.Random], str] | None = None,
    ):
        self._separator = text.HAYSTACK_SEPARATORS[haystack]
        self._count = renderer.count
        self._drawn: list[tuple[str, int]] = []
        self._sizes: dict[str, int] = {}
        self._source = _source(haystack, random.Random(rng_seed), distractor)

    def units(self, budget: int, *, dropped: int = 0) -> list[str]:
        """Units of `budget` tokens at most, whole sentences, as near to it as they go.

        Args:
            budget: tokens.
            dropped: so many units fewer than would fit; noise takes their room.
        """
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
        for _ in range(min(dropped, len(units))):
            budget += self._size(self._separator + units.pop())
        # A needle of UUIDs may be longer than all that the tail is chosen from.
        line = " ".join(text.NOISE_SENTENCES)
        while budget > 2 * self._size(self._separator + line):
            units.append(line)
            budget -= self._size(self._separator + line)
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


def _source(
    haystack: str, rng: random.Random, distractor: Callable[[random.Random], str] | None
) -> Iterator[str]:
    if haystack == "essay":
        yield from essay_sentences(rng)
    while True:
        if haystack == "noise":
            yield " ".join(text.NOISE_SENTENCES)
        else:
            assert distractor is not None, "a needle haystack is made of needles"
            yield distractor(rng)
