"""`generate` and `stream`: prompts in, answers out, over the model's public prefill and decode."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.attention import check_stream
from swaa_jax.checkpoint.hf import read_generation_config
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.fields import integer, list_of
from swaa_jax.infer.decoding import (
    DecodeClock,
    Prefilled,
    decode_rows,
    prefill_prompts,
)
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.prompts import Prompts, check_context, encode_prompts
from swaa_jax.infer.sampling import SamplingParams
from swaa_jax.infer.stopping import AnswerRow, FinishReason, StopRules, TokenText, make_stop_rules
from swaa_jax.infer.timings import Timings
from swaa_jax.limits import MAX_TOKEN_ID
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, split_model
from swaa_jax.models.source import config_overrides
from swaa_jax.progress import show_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 8
STREAM_STEPS = 4
"""Decode steps between two pieces of a stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Answers, in the order of the prompts.

    Args:
        texts: without special tokens, cut before a stop string; empty without a tokenizer.
        tokens: new ids only, up to and including the one that ended the answer.
        finish_reasons: "eos", "stop" (a stop string or stop token) or "length".
        timings: what it cost.
        logprobs: of each of `tokens`, where they were asked for: the natural logarithm of its
            probability under the model, before temperature, filters and penalties.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    timings: Timings
    logprobs: tuple[tuple[float, ...], ...] | None = None


def generate(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase | None",
    prompts: Prompts,
    *,
    options: GenerateOptions | None = None,
    **overrides: object,
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
        options: how they are answered.
        overrides: fields of `GenerateOptions` in place of those of `options`, as in
            `generate(model, tok, prompts, max_new_tokens=200, temperature=0.7)`.

    Raises:
        ValueError: an empty prompt, prompt and answer beyond the model's context, a token id out
            of the vocabulary, an unknown option, or one out of range.
    """
    options = GenerateOptions.of(options, overrides)
    encoded = encode_prompts(tok, prompts, room=_context(model), **options.template_options)
    limit = options.max_new_tokens
    check_prompts(model, encoded, max_new_tokens=limit, positions=options.positions)
    session = _Session(model, tok, options)
    split = split_model(model)

    by_length = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    size = options.batch_size or DEFAULT_BATCH_SIZE
    rows: dict[int, AnswerRow] = {}
    timings = []
    total, show = len(encoded) * limit, options.progress
    with show_progress("generating", total=total, unit="tokens", enabled=show) as bar:
        for start in range(0, len(by_length), size):
            group = by_length[start : start + size]
            prefilled = prefill_prompts(
                split,
                [encoded[index] for index in group],
                max_new_tokens=limit,
                row_ids=group,
                pad_id=pad_token_id(tok),
                warmup=options.warmup,
                positions=options.positions,
            )
            run = session.start(split, prefilled)
            for _ in run.calls:
                bar.show(bar.text, start * limit + run.progress)
            rows.update(zip(group, run.rows, strict=True))
            timings.append(run.timings())
    return _generation(
        [rows[index] for index in range(len(encoded))], Timings.total(timings), options
    )


def decode_from(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase | None",
    prefilled: Prefilled,
    *,
    options: GenerateOptions | None = None,
    keep_caches: bool = False,
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
        options: as in `generate`, `max_new_tokens` at most what the prefill made room for; those
            that say how prompts are rendered and batched have no part in this.
        keep_caches: decode from a copy, so that `prefilled` can serve again.
        on_progress: called now and then with the number of new tokens so far.

    Raises:
        ValueError: another policy, or more tokens than the caches have room for.
    """
    options = options or GenerateOptions(max_new_tokens=prefilled.max_new_tokens)
    run = _Session(model, tok, options).start(
        split_model(model), prefilled, keep_caches=keep_caches
    )
    for _ in run.calls:
        if on_progress is not None:
            on_progress(run.progress)
    return _generation(run.rows, run.timings(), options)


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
        self.generation = _generation(run.rows, run.timings(), run.options)

    def __next__(self) -> str:
        return next(self._pieces)


def stream(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase | None",
    prompt: Prompts,
    *,
    options: GenerateOptions | None = None,
    **overrides: object,
) -> Stream:
    """Answer one prompt piece by piece; the arguments are those of `generate`.

    The prompt is checked and read before this returns.

    Raises:
        ValueError: as `generate`, or more than one prompt.
    """
    options = GenerateOptions.of(options, overrides)
    encoded = encode_prompts(tok, prompt, room=_context(model), **options.template_options)
    if len(encoded) != 1:
        raise ValueError(f"prompt: expected one prompt to stream, got {len(encoded)}")
    check_prompts(
        model, encoded, max_new_tokens=options.max_new_tokens, positions=options.positions
    )
    session = _Session(model, tok, options)
    split = split_model(model)
    prefilled = prefill_prompts(
        split,
        encoded,
        max_new_tokens=options.max_new_tokens,
        pad_id=pad_token_id(tok),
        warmup=options.warmup,
        positions=options.positions,
    )
    return Stream(session.start(split, prefilled, streaming=True))


def check_prompts(
    model: CausalLM,
    token_lists: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    positions: str = "text",
) -> None:
    """Refuse prompts that this model cannot take; see `prompts.check_context`.

    With positions inside the cache only the prompt, and window and sinks, must fit the context.
    """
    context = _context(model)
    if positions == "cache":
        check_stream(model.layer_attention, context=context)
        max_new_tokens = 0
    check_context(
        token_lists,
        max_new_tokens=max_new_tokens,
        vocab_size=model.config.vocab_size,
        context=context,
    )


def _context(model: CausalLM) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


@dataclasses.dataclass(kw_only=True)
class _Run:
    """One batch being answered: iterate `calls` to the end, then read `rows` and `timings()`."""

    prefilled: Prefilled
    rows: list[AnswerRow]
    calls: Iterator[None]
    clock: DecodeClock
    options: GenerateOptions

    @property
    def progress(self) -> int:
        """Tokens so far, a row that has ended counting as full."""
        limit = self.options.max_new_tokens
        return sum(limit if row.is_done else len(row.tokens) for row in self.rows)

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

    def __init__(
        self,
        model: CausalLM,
        tok: "PreTrainedTokenizerBase | None",
        options: GenerateOptions,
    ):
        self._tok, self._text, self._options = tok, TokenText(tok), options
        self._params = options.sampling_params
        if options.sampling == "checkpoint":
            config = generation_config(model)
            if not config:
                raise ValueError(
                    'sampling: expected a model with a generation_config.json for "checkpoint", '
                    "got none; give temperature, top_k and top_p instead"
                )
            self._params = SamplingParams.from_generation_config(config)
        else:
            self._params.warn_of_unused("options")
        self._rules: StopRules = make_stop_rules(
            None if tok is None else self._text,
            eos_ids=() if options.ignore_eos else eos_token_ids(model, tok),
            stop=options.stop,
            stop_token_ids=options.stop_token_ids,
            stop_in_thought=options.stop_in_thought,
        )

    def start(
        self,
        model: SplitModel,
        prefilled: Prefilled,
        *,
        streaming: bool = False,
        keep_caches: bool = False,
    ) -> _Run:
        options = self._options
        limit = options.max_new_tokens
        if limit > prefilled.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: expected at most {prefilled.max_new_tokens}, which the prefill "
                f"made room for, got {limit}"
            )
        if options.positions != prefilled.positions:
            raise ValueError(
                f'positions: expected "{prefilled.positions}", as the prefill had it, got '
                f'"{options.positions}"; prefill again with these options'
            )
        rows = [
            AnswerRow(
                self._text,
                self._rules,
                max_new_tokens=limit,
                streaming=streaming,
                opened=self._opens_thinking(ids),
            )
            for ids in prefilled.prompts
        ]
        clock = DecodeClock()
        steps = min(STREAM_STEPS, options.chunk_size) if streaming else options.chunk_size
        calls = decode_rows(
            model,
            prefilled,
            rows,
            params=self._params,
            options=options,
            stop_ids=self._rules.all_ids,
            steps_per_call=steps,
            keep_caches=keep_caches,
            clock=clock,
        )
        return _Run(prefilled=prefilled, rows=rows, calls=calls, clock=clock, options=options)

    def _opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought, where that makes a difference."""
        if self._tok is None or self._rules.stop_in_thought:
            return False
        return opens_thinking(self._tok, ids)


def generation_config(model: CausalLM) -> dict[str, Any]:
    """The generation config of the directory that the model came from; {} if there is none."""
    source = getattr(model, "source", None)
    return {} if source is None else dict(read_generation_config(source))


def eos_token_ids(model: CausalLM, tok: "PreTrainedTokenizerBase | None") -> tuple[int, ...]:
    """Tokens that end an answer: an override's, the generation config's or the config's, whichever
    comes first; and the tokenizer's.

    Raises:
        ValueError: one that is no token id.
    """
    is_overridden = "eos_token_id" in config_overrides(model)
    ids = None if is_overridden else generation_config(model).get("eos_token_id")
    for name in ("eos_token_id", "eos_token_ids"):
        ids = getattr(model.config, name, None) if ids is None else ids
    ids = () if ids is None else (ids,) if isinstance(ids, int) else ids
    own = getattr(tok, "eos_token_id", None)
    ids = list_of(integer(least=0, most=MAX_TOKEN_ID))("eos_token_id", ids)
    return tuple(sorted({*ids, *(() if own is None else (int(own),))}))


def pad_token_id(tok: "PreTrainedTokenizerBase | None") -> int:
    """The tokenizer's padding; any token in the vocabulary serves, since it is never seen."""
    pad = getattr(tok, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def _generation(
    rows: Sequence[AnswerRow], timings: Timings, options: GenerateOptions
) -> Generation:
    reasons = [row.finish_reason for row in rows]
    assert all(reason is not None for reason in reasons), "a row was left unfinished"
    return Generation(
        texts=tuple(row.text for row in rows),
        tokens=tuple(tuple(row.tokens) for row in rows),
        finish_reasons=tuple(reasons),  # pyright: ignore[reportArgumentType]
        timings=timings,
        logprobs=tuple(tuple(row.logprobs) for row in rows) if options.logprobs else None,
    )
