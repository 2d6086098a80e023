"""`generate` and `stream`: prompts in, answers out, over an engine."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swaa_jax.arguments import check_model, check_tokenizer, told_keywords
from swaa_jax.attention import check_stream
from swaa_jax.figures import new_figure, save_figure
from swaa_jax.infer.answerer import Answerer, Answering, context_of
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.prompts import Prompts, check_context, encode_prompts
from swaa_jax.infer.stopping import FinishReason
from swaa_jax.infer.timings import Timings
from swaa_jax.models import CausalLM
from swaa_jax.progress import show_progress
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


_SHOWN, _LONGEST = 4, 120  # answers of a repr, and characters of each


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Generation(Tabular):
    """Answers, in the order of the prompts.

    Args:
        texts: without special tokens, cut before a stop string; empty without a tokenizer.
        tokens: new ids only, up to and including the one that ended the answer.
        finish_reasons: "eos", "stop" (a stop string or stop token) or "length".
        timings: what it cost.
        logprobs: of each of `tokens`, where they were asked for: the natural logarithm of its
            probability under the model, before temperature, filters and penalties.

    Examples:
        >>> timings = Timings(
        ...     num_rows=1, prompt_tokens=3, new_tokens=2, prefill_s=0.1, first_token_s=0.0,
        ...     decode_s=0.2, decode_steps=2, compile_s=0.0, cache_bytes=1 << 20,
        ...     cache_bytes_per_row=1 << 20,
        ... )
        >>> done = Generation(
        ...     texts=("It is 2.",), tokens=((8, 2),), finish_reasons=("eos",), timings=timings
        ... )
        >>> done.table().columns
        ('prompt', 'text', 'new_tokens', 'finish_reason')
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    timings: Timings
    logprobs: tuple[tuple[float, ...], ...] | None = None

    def table(self) -> Table:
        """The answers, one a line: `prompt` (its number), `text`, `new_tokens`, `finish_reason`;
        and `logprob`, the sum over the tokens, where it was asked for.
        """
        lines = []
        for number, (text, ids) in enumerate(zip(self.texts, self.tokens, strict=True)):
            line = {"prompt": number, "text": text, "new_tokens": len(ids)}
            line["finish_reason"] = self.finish_reasons[number]
            if self.logprobs is not None:
                line["logprob"] = sum(self.logprobs[number])
            lines.append(line)
        return Table.of(lines, caption=str(self.timings))

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Where the time went: seconds of compiling, reading prompts and generating.

        Args:
            path: where to save it, such as ``timings.png``.
        """
        timings = self.timings
        parts = {
            "compiling": timings.compile_s,
            f"reading {timings.prompt_tokens:,} tokens": timings.prefill_s,
            f"generating {timings.new_tokens:,} tokens": timings.first_token_s + timings.decode_s,
        }
        figure = new_figure(width=6, height=1.8, layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh(list(parts), list(parts.values()), color="#0072B2")
        axes.bar_label(bars, fmt="{:,.2f} s", padding=3)
        axes.set(xlabel="seconds", xmargin=0.15)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)

    def __repr__(self) -> str:
        texts = [_cut(text) for text in self.texts[:_SHOWN]]
        more = len(self.texts) - _SHOWN
        shown = ", ".join([*map(repr, texts), *([f"and {more} more"] if more > 0 else [])])
        return f"Generation({shown}; {self.timings})"


@told_keywords()
def generate(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase | None",
    prompts: Prompts,
    *,
    options: GenerateOptions | None = None,
    **overrides: object,
) -> Generation:
    """Answer prompts under the model's attention policy.

    Prompt tokens are in stage PROMPT, the last one included, and new tokens in stage ANSWER
    (arXiv 2512.10411, section 3.1). At most `batch_size` prompts are answered at a time; where one
    ends, the next begins. What else is being answered changes no answer.

    Args:
        model: from `load_model`.
        tok: from `load_tokenizer`; may be None where all prompts are token ids.
        prompts: strings (never templated), message lists (templated once), token ids (a list or an
            array `[T]`), or a single one of these.
        options: how they are answered.
        overrides: fields of `GenerateOptions` in place of those of `options`, as in
            `generate(model, tok, prompts, max_new_tokens=200, temperature=0.7)`.

    Raises:
        ValueError: an empty prompt, prompt and answer beyond the model's context, a token id out
            of the vocabulary, an unknown option, or one out of range.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever", policy="window=64,sinks=4,decode=full")
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> out = generate(model, tok, "The grass is green. The sky", max_new_tokens=8)
        >>> len(out.tokens[0]), out.finish_reasons  # print(out.texts[0])
        (8, ('length',))
    """
    options = GenerateOptions.of(options, overrides)
    check_model("model", model)
    check_tokenizer("tok", tok)
    encoded = encode_prompts(tok, prompts, room=context_of(model), **options.template_options)
    limit = options.max_new_tokens
    check_prompts(model, encoded, max_new_tokens=limit, positions=options.positions)
    total, show = len(encoded) * limit, options.progress
    with show_progress("compiling", total=total, unit="tokens", enabled=show) as bar:
        answerer = Answerer(model, tok, options, lengths=[len(ids) for ids in encoded])
        answerer.tell_stages(lambda stage: bar.show(stage, bar.done))
        answering = answerer.start(encoded)
        for progress in answering:
            bar.show(bar.text, progress)
    return generation_of(answering)


class Stream(Iterator[str]):
    """Pieces of one answer's text, as they come; together they are `generation.texts[0]`.

    A piece never holds a part of a character nor a text that may still prove a stop string.
    `generation` is None until the last piece is out.

    Examples:
        ```python
        pieces = swaa.stream(model, tok, "The grass is", max_new_tokens=8)
        for piece in pieces:
            print(piece, end="", flush=True)
        assert pieces.generation is not None  # with tokens, the reason of the end and timings
        ```
    """

    def __init__(self, answerer: Answerer, prompt: Sequence[int]):
        self.generation: Generation | None = None
        self._pieces = self._produce(answerer, prompt)

    def _produce(self, answerer: Answerer, prompt: Sequence[int]) -> Iterator[str]:
        answering = answerer.start([prompt])
        pieces = (piece for _ in answering if (piece := answering.rows[0].take_text()))
        show = answerer.options.progress
        # Until the first piece only, with which the bar's place is somebody else's.
        with show_progress("compiling", total=1, enabled=show, leave=False) as bar:
            answerer.tell_stages(lambda stage: bar.show(stage, bar.done))
            first = next(pieces, None)
        answerer.tell_stages(lambda stage: None)
        if first is not None:
            yield first
        yield from pieces
        self.generation = generation_of(answering)

    def __next__(self) -> str:
        return next(self._pieces)


@told_keywords()
def stream(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase | None",
    prompt: Prompts,
    *,
    options: GenerateOptions | None = None,
    **overrides: object,
) -> Stream:
    """Answer one prompt (a text, a chat or token ids `[T]`) piece by piece, as `generate` does.

    The prompt is checked before this returns, and read with the first piece.

    Raises:
        ValueError: as `generate`, or more than one prompt.

    Examples:
        >>> import swaa_jax as swaa
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> pieces = stream(model, tok, "The grass is green. The sky", max_new_tokens=8)
        >>> "".join(pieces) == pieces.generation.texts[0]
        True
    """
    options = GenerateOptions.of(options, overrides)
    check_model("model", model)
    check_tokenizer("tok", tok)
    encoded = encode_prompts(tok, prompt, room=context_of(model), **options.template_options)
    if len(encoded) != 1:
        raise ValueError(f"prompt: expected one prompt to stream, got {len(encoded)}")
    check_prompts(
        model, encoded, max_new_tokens=options.max_new_tokens, positions=options.positions
    )
    answerer = Answerer(model, tok, options, lengths=[len(encoded[0])], streaming=True)
    return Stream(answerer, encoded[0])


def check_prompts(
    model: CausalLM,
    token_lists: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    positions: str = "text",
) -> None:
    """Refuse prompts that this model cannot take; see `prompts.check_context`.

    With positions inside the cache only the prompt, and window and sinks, must fit the context.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever")
        >>> check_prompts(model, [[5, 6, 7]], max_new_tokens=20)
        >>> check_prompts(model, [[5, 6, 70_000]], max_new_tokens=20)
        Traceback (most recent call last):
            ...
        ValueError: prompt 0: expected token ids from 0 to ... got 70000; ...
    """
    context = context_of(model)
    if positions == "cache":
        check_stream(model.layer_attention, context=context)
        max_new_tokens = 0
    check_context(
        token_lists,
        max_new_tokens=max_new_tokens,
        vocab_size=model.config.vocab_size,
        context=context,
    )


def generation_of(answering: Answering) -> Generation:
    """What has been answered, all of it.

    Examples:
        ```python
        answering = answerer.start([[5, 6, 7]])
        for _ in answering:
            pass
        generation_of(answering).texts
        ```
    """
    rows = answering.rows
    reasons = [row.finish_reason for row in rows]
    assert all(reason is not None for reason in reasons), "a row was left unfinished"
    return Generation(
        texts=tuple(row.text for row in rows),
        tokens=tuple(tuple(row.tokens) for row in rows),
        finish_reasons=tuple(reasons),  # pyright: ignore[reportArgumentType]
        timings=answering.timings,
        logprobs=tuple(tuple(row.logprobs) for row in rows) if answering.options.logprobs else None,
    )
