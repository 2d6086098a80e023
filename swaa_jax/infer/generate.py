"""`generate` and `stream`: prompts in, answers out, over the model's public prefill and decode."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from swaa_jax.checkpoint.hf import read_generation_config
from swaa_jax.infer.decoding import (
    DecodeClock,
    Prefilled,
    decode_rows,
    prefill_prompts,
)
from swaa_jax.infer.prompts import check_context, encode_prompts
from swaa_jax.infer.sampling import SamplingParams
from swaa_jax.infer.stopping import AnswerRow, FinishReason, StopRules, make_stop_rules
from swaa_jax.infer.timings import Timings
from swaa_jax.models.function import SplitModel, split_model

DEFAULT_BATCH_SIZE = 8
STREAM_STEPS = 4
"""Decode steps between two pieces of a stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How prompts that were read are answered; see `generate`.

    Raises:
        ValueError: a value out of range, or `sampling="checkpoint"` beside values of your own.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    sampling: Literal["checkpoint"] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    chunk_size: int = 32

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1 step, got {self.chunk_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected an integer from 0 to 2**32 - 1, got {self.seed}")
        own = SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if self.sampling not in (None, "checkpoint"):
            raise ValueError(f'sampling: expected None or "checkpoint", got {self.sampling!r}')
        if self.sampling and own != SamplingParams():
            raise ValueError(
                'sampling: "checkpoint" takes temperature, top_k and top_p from the generation '
                "config; leave these out, or leave sampling out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Answers, in the order of the prompts.

    Args:
        texts: without special tokens, cut before a stop string; empty without a tokenizer.
        tokens: new ids only, up to and including the one that ended the answer.
        finish_reasons: "eos", "stop" (a stop string or stop token) or "length".
        timings: what it cost.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    timings: Timings


def generate(
    model: Any,
    tok: Any,
    prompts: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sampling: Literal["checkpoint"] | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    enable_thinking: bool | None = None,
    cot: bool | str = False,
    batch_size: int | None = None,
    progress: bool = False,
    warmup: bool = False,
    chunk_size: int = 32,
) -> Generation:
    """Answer prompts under the model's attention policy.

    Prompt tokens are in stage PROMPT, the last one included, and new tokens in stage ANSWER (paper,
    section 3.2). Prompts are padded on the right to a bucket of lengths, batches to a power of
    two; neither changes what a row sees. The tokenizer's `padding_side` is ignored.

    Args:
        model: from `load_model`.
        tok: from `load_tokenizer`; may be None where all prompts are token ids.
        prompts: strings (never templated), message lists (templated once), token id lists, or a
            single one of these.
        max_new_tokens: the longest answer.
        temperature: 0 is greedy.
        top_k, top_p: draw among the most likely tokens only (Transformers' order and meaning).
        seed: draws depend on it, on the prompt's index and on the position, on nothing else.
        sampling: "checkpoint" takes temperature, top_k and top_p from the generation config.
        stop: texts that end an answer; it is cut before them.
        stop_token_ids: tokens that end an answer.
        ignore_eos: go on past the model's end tokens (generation config, else config, and the
            tokenizer's).
        tools, chat_template_kwargs, enable_thinking: for the chat template.
        cot: True or a text: an instruction to reason, appended to the last user message.
        batch_size: prompts run at once, by default at most 8; more are run in groups of similar
            length, the longest first.
        progress: show a progress bar on stderr.
        warmup: run each prefill and a decode step once before the timed runs; see `Timings` for
            what is measured.
        chunk_size: the most decode steps between two looks at the stop strings.

    Raises:
        ValueError: an empty prompt, prompt and answer beyond the model's context, a token id out
            of the vocabulary, or an option out of range.
    """
    options = DecodeOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        sampling=sampling,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        chunk_size=chunk_size,
    )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    encoded = encode_prompts(
        tok,
        prompts,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        enable_thinking=enable_thinking,
        cot=cot,
    )
    check_prompts(model, encoded, max_new_tokens=max_new_tokens)
    session = _Session(model, tok, options)
    split = split_model(model)

    by_length = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    size = batch_size or DEFAULT_BATCH_SIZE
    rows: dict[int, AnswerRow] = {}
    timings = []
    with _progress_bar(len(encoded) * max_new_tokens, show=progress) as advance:
        for start in range(0, len(by_length), size):
            group = by_length[start : start + size]
            prefilled = prefill_prompts(
                split,
                [encoded[index] for index in group],
                max_new_tokens=max_new_tokens,
                row_ids=group,
                pad_id=_pad_id(tok),
                warmup=warmup,
            )
            run = session.start(split, prefilled, warmup=warmup)
            for _ in run.calls:
                advance(start * max_new_tokens + run.progress)
            rows.update(zip(group, run.rows, strict=True))
            timings.append(run.timings())
    return _generation([rows[index] for index in range(len(encoded))], Timings.total(timings))


def decode_from(
    model: Any,
    tok: Any,
    prefilled: Prefilled,
    *,
    options: DecodeOptions | None = None,
    keep_caches: bool = False,
    warmup: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Generation:
    """Answer prompts that `prefill_prompts` has read.

    One prefill can serve several policies that differ only in `decode`, since prompt tokens are
    windowed under all of them: run it under `decode="full"`, which keeps every key, then

        for policy in policies:
            decode_from(model.with_policy(policy), tok, prefilled, keep_caches=True)

    Args:
        model: under the prefill's policy, or one that differs from it in `decode` only.
        tok: the tokenizer, or None where only tokens matter.
        prefilled: its caches are used up unless `keep_caches`.
        options: as in `generate`; `max_new_tokens` at most what the prefill made room for.
        keep_caches: decode from a copy, so that `prefilled` can serve again.
        warmup: run a step on a copy of the caches before the steps that are timed.
        on_progress: called now and then with the number of new tokens so far.

    Raises:
        ValueError: another policy, or more tokens than the caches have room for.
    """
    options = options or DecodeOptions(max_new_tokens=prefilled.max_new_tokens)
    session = _Session(model, tok, options)
    run = session.start(split_model(model), prefilled, keep_caches=keep_caches, warmup=warmup)
    for _ in run.calls:
        if on_progress is not None:
            on_progress(run.progress)
    return _generation(run.rows, run.timings())


class Stream(Iterator[str]):
    """Pieces of one answer's text, as they come; together they are `generation.texts[0]`.

    A piece never holds a part of a character nor a text that may still prove a stop string.
    `generation` is None until the last piece is out.
    """

    def __init__(self, run: "_Run"):
        self.generation: Generation | None = None
        self._pieces = self._produce(run)

    def _produce(self, run: "_Run") -> Iterator[str]:
        for _ in run.calls:
            piece = run.rows[0].take_text()
            if piece:
                yield piece
        self.generation = _generation(run.rows, run.timings())

    def __next__(self) -> str:
        return next(self._pieces)


def stream(
    model: Any,
    tok: Any,
    prompt: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sampling: Literal["checkpoint"] | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    enable_thinking: bool | None = None,
    cot: bool | str = False,
    warmup: bool = False,
    chunk_size: int = 32,
) -> Stream:
    """Answer one prompt piece by piece; the arguments are those of `generate`.

    The prompt is checked and read before this returns.

    Raises:
        ValueError: as `generate`, or more than one prompt.
    """
    options = DecodeOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        sampling=sampling,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        chunk_size=chunk_size,
    )
    encoded = encode_prompts(
        tok,
        prompt,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        enable_thinking=enable_thinking,
        cot=cot,
    )
    if len(encoded) != 1:
        raise ValueError(f"prompt: expected one prompt to stream, got {len(encoded)}")
    check_prompts(model, encoded, max_new_tokens=max_new_tokens)
    session = _Session(model, tok, options)
    split = split_model(model)
    prefilled = prefill_prompts(
        split, encoded, max_new_tokens=max_new_tokens, pad_id=_pad_id(tok), warmup=warmup
    )
    return Stream(session.start(split, prefilled, streaming=True, warmup=warmup))


def check_prompts(model: Any, token_lists: Sequence[Sequence[int]], *, max_new_tokens: int) -> None:
    """Refuse prompts that this model cannot take; see `prompts.check_context`."""
    check_context(
        token_lists,
        max_new_tokens=max_new_tokens,
        vocab_size=model.config.vocab_size,
        context=getattr(model.config, "max_position_embeddings", None),
    )


@dataclasses.dataclass(kw_only=True)
class _Run:
    """One batch being answered: iterate `calls` to the end, then read `rows` and `timings()`."""

    prefilled: Prefilled
    rows: list[AnswerRow]
    calls: Iterator[None]
    clock: DecodeClock
    max_new_tokens: int

    @property
    def progress(self) -> int:
        """Tokens so far, a row that has ended counting as full."""
        return sum(self.max_new_tokens if row.is_done else len(row.tokens) for row in self.rows)

    def timings(self) -> Timings:
        return Timings(
            num_rows=len(self.rows),
            prompt_tokens=sum(self.prefilled.prompt_lengths),
            new_tokens=sum(len(row.tokens) for row in self.rows),
            prefill_s=self.prefilled.prefill_s,
            first_token_s=self.clock.first_token_s,
            decode_s=self.clock.decode_s,
            decode_steps=self.clock.decode_steps,
            compile_s=self.prefilled.compile_s + self.clock.compile_s,
            cache_bytes=self.clock.cache_bytes,
            cache_bytes_per_row=self.clock.cache_bytes_per_row,
        )


class _Session:
    """A model, a tokenizer and options with the checkpoint's defaults filled in."""

    def __init__(self, model: Any, tok: Any, options: DecodeOptions):
        self._tok, self._options = tok, options
        config = generation_config(model)
        if options.sampling == "checkpoint":
            if not config:
                raise ValueError(
                    'sampling: "checkpoint" needs a generation_config.json, and the model has '
                    "none; give temperature, top_k and top_p instead"
                )
            self._params = SamplingParams.from_generation_config(config)
        else:
            self._params = SamplingParams(
                temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
            )
        self._rules: StopRules = make_stop_rules(
            tok,
            eos_ids=() if options.ignore_eos else eos_token_ids(model, tok),
            stop=options.stop,
            stop_token_ids=options.stop_token_ids,
        )

    def start(
        self,
        model: SplitModel,
        prefilled: Prefilled,
        *,
        streaming: bool = False,
        keep_caches: bool = False,
        warmup: bool = False,
    ) -> _Run:
        options = self._options
        if options.max_new_tokens > prefilled.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: expected at most {prefilled.max_new_tokens}, which the prefill "
                f"made room for, got {options.max_new_tokens}"
            )
        rows = [
            AnswerRow(
                self._tok,
                self._rules,
                max_new_tokens=options.max_new_tokens,
                streaming=streaming,
            )
            for _ in prefilled.prompt_lengths
        ]
        clock = DecodeClock()
        calls = decode_rows(
            model,
            prefilled,
            rows,
            params=self._params,
            seed=options.seed,
            stop_ids=self._rules.all_ids,
            max_new_tokens=options.max_new_tokens,
            chunk_size=options.chunk_size,
            steps_per_call=min(STREAM_STEPS, options.chunk_size)
            if streaming
            else options.chunk_size,
            keep_caches=keep_caches,
            warmup=warmup,
            clock=clock,
        )
        return _Run(
            prefilled=prefilled,
            rows=rows,
            calls=calls,
            clock=clock,
            max_new_tokens=options.max_new_tokens,
        )


def generation_config(model: Any) -> dict[str, Any]:
    """The generation config of the directory that the model came from; {} if there is none."""
    source = getattr(model, "source", None)
    return {} if source is None else dict(read_generation_config(source))


def eos_token_ids(model: Any, tok: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the config's; the tokenizer's."""
    ids = generation_config(model).get("eos_token_id")
    for name in ("eos_token_id", "eos_token_ids"):
        ids = getattr(model.config, name, None) if ids is None else ids
    ids = () if ids is None else (ids,) if isinstance(ids, int) else ids
    own = getattr(tok, "eos_token_id", None)
    return tuple(sorted({int(token) for token in ids} | ({int(own)} if own is not None else set())))


def _pad_id(tok: Any) -> int:
    # Any token in the vocabulary serves, since padding is never seen.
    pad = getattr(tok, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def _generation(rows: Sequence[AnswerRow], timings: Timings) -> Generation:
    reasons = [row.finish_reason for row in rows]
    assert all(reason is not None for reason in reasons), "a row was left unfinished"
    return Generation(
        texts=tuple(row.text for row in rows),
        tokens=tuple(tuple(row.tokens) for row in rows),
        finish_reasons=tuple(reasons),  # pyright: ignore[reportArgumentType]
        timings=timings,
    )


@contextlib.contextmanager
def _progress_bar(total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or nothing; gives the function that sets how far it is."""
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total)
        yield lambda done: bar.update(task, completed=done)
