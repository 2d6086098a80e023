"""From prompts' ids to answers' rows: an engine, and what ends an answer besides its tokens.

prompts --requests--> engine --tokens--> AnswerRow: text, stop strings
^------ cancel ------' a row that ends before the engine knows
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kernels_pallas.layout import next_power_of_two
from swaa_jax.checkpoint.hf import read_generation_config
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.engine import Engine, EngineClock, EngineOptions, Request, SamplingParams, Update
from swaa_jax.fields import integer, list_of
from swaa_jax.infer.buckets import length_bucket
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.stopping import AnswerRow, StopRules, TokenText, make_stop_rules
from swaa_jax.infer.timings import Timings
from swaa_jax.limits import MAX_TOKEN_ID
from swaa_jax.models import CausalLM
from swaa_jax.models.source import config_overrides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 8
STREAM_STEPS = 4
"""Decode steps between two pieces of a stream."""

_LEAST_ROOM = 128
"""Tokens of a row, at least, so that short prompts and answers all share two programs."""

_MOST_SNAPSHOTS = 16
"""Prompts of a call that begin alike need few; the memory may be somebody else's."""


class Answerer:
    """A model that answers prompts in one way; its engine serves one set of prompts after another.

    Args:
        model: a causal language model under its policy.
        tok: the tokenizer, or None where only tokens matter.
        options: how prompts are answered; those that say how they are rendered have no part in it.
        lengths: tokens of the prompts that are to come, which say what there must be room for.
        streaming: come back often, for pieces of text.

    Raises:
        ValueError: `sampling="checkpoint"` without a generation config, or settings that do not
            fit the model, such as stop tokens outside its vocabulary.

    Examples:
        ```python
        answerer = Answerer(model, tok, GenerateOptions(max_new_tokens=20), lengths=[100, 300])
        for prompts in batches:  # of token ids; programs are compiled for the first ones
            answering = answerer.start(prompts)
            for tokens in answering:
                print(tokens, "new tokens so far")
            print([row.text for row in answering.rows], answering.timings)
        ```
    """

    def __init__(
        self,
        model: CausalLM,
        tok: "PreTrainedTokenizerBase | None",
        options: GenerateOptions,
        *,
        lengths: Sequence[int],
        streaming: bool = False,
    ):
        self.options = options
        self._tok, self._text, self._streaming = tok, TokenText(tok), streaming
        self._params = _sampling_params(model, options)
        vocab_size = model.config.vocab_size
        outside = [token for token in options.stop_token_ids if token >= vocab_size]
        if outside:
            raise ValueError(
                f"stop_token_ids: expected ids from 0 to {vocab_size - 1} (the model's "
                f"vocabulary), got {outside[0]}; leave it out"
            )
        self._rules: StopRules = make_stop_rules(
            None if tok is None else self._text,
            eos_ids=() if options.ignore_eos else eos_token_ids(model, tok),
            stop=options.stop,
            stop_token_ids=options.stop_token_ids,
            stop_in_thought=options.stop_in_thought,
        )
        # A tokenizer may name special tokens that no token of the model can be.
        self._ends = [token for token in self._rules.all_ids if token < vocab_size]
        room = _room_for(options, lengths, streaming=streaming)
        self._engine, self._num_slots = Engine(model, room), room.num_slots
        self._compile_s = 0.0  # of it, what was told already
        if options.warmup:
            self._engine.submit(Request(tokens=(0,), max_new_tokens=2))
            for _ in self._engine.run():
                pass

    def tell_stages(self, tell: Callable[[str], None]) -> None:
        """Has a function told what is begun: "compiling", "reading" or "generating"."""
        self._engine.clock.tell = tell

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> "Answering":
        """Begins to answer prompts, which `check_prompts` has seen.

        Args:
            prompts: token ids.
            numbers: the prompts' indices in the caller's order, by default 0, 1, ...; draws depend
                on them.
            seed: in place of the options'.
        """
        if not self._engine.is_idle:
            raise RuntimeError(
                "prompts: expected the last ones to be answered, got more beside them"
            )
        numbers = range(len(prompts)) if numbers is None else numbers
        rows, requests = [], {}
        before = dataclasses.replace(self._engine.clock, compile_s=self._compile_s)
        self._compile_s = self._engine.clock.compile_s
        for ids, number in zip(prompts, numbers, strict=True):
            row = AnswerRow(
                self._text,
                self._rules,
                max_new_tokens=self.options.max_new_tokens,
                streaming=self._streaming,
                opened=self._opens_thinking(ids),
            )
            request = self._engine.submit(
                Request(
                    tokens=ids,
                    max_new_tokens=self.options.max_new_tokens,
                    params=self._params,
                    seed=self.options.seed if seed is None else seed,
                    number=number,
                    ends=self._ends,
                    logprobs=self.options.logprobs,
                )
            )
            rows.append(row)
            requests[request] = (number, row)
        return Answering(
            self._engine,
            rows,
            requests,
            prompts,
            self.options,
            num_slots=self._num_slots,
            before=before,
        )

    def _opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought, where that makes a difference."""
        if self._tok is None or self._rules.stop_in_thought:
            return False
        return opens_thinking(self._tok, ids)


class Answering:
    """Prompts being answered: iterate to the end, then look at `rows` and `timings`.

    Each turn gives the new tokens so far, a row that has ended counting as full.

    Attributes:
        rows: one a prompt.
        options: how they are answered.

    Examples:
        >>> import swaa_jax as swaa
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> answerer = Answerer(model, tok, GenerateOptions(max_new_tokens=4), lengths=[3])
        >>> answering = answerer.start([[5, 6, 7]])  # `for tokens in answering: ...` goes on
        >>> answering.rows[0].is_done, answering.timings.prompt_tokens
        (False, 3)
    """

    def __init__(
        self,
        engine: Engine,
        rows: list[AnswerRow],
        requests: dict[int, tuple[int, AnswerRow]],
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        *,
        num_slots: int,
        before: EngineClock,
    ):
        self.rows, self.options, self._num_slots = rows, options, num_slots
        self._engine, self._requests, self._prompts = engine, requests, prompts
        self._before = before

    def __iter__(self) -> Iterator[int]:
        limit = self.options.max_new_tokens
        try:
            while self._requests:
                for update in self._engine.round():
                    self._take(update)
                yield sum(limit if row.is_done else len(row.tokens) for row in self.rows)
        finally:  # somebody who stops looking leaves an engine that is free
            for request in self._engine.unfinished.intersection(self._requests):
                self._engine.cancel(request)
            self._requests.clear()

    def _take(self, update: Update) -> None:
        number, row = self._requests[update.request]
        row.push(update.tokens, update.logprobs or None)
        if update.reason is not None:
            del self._requests[update.request]
        if update.reason == "not a number" and not row.is_done:
            raise ValueError(
                f"prompt {number}: expected logits that are numbers, got NaN or infinity for new "
                f"token {len(row.tokens) + 1}; see whether the weights are whole, and load the "
                "model in bfloat16 or float32 if it is in float16"
            )
        if row.is_done and update.reason is None:
            self._engine.cancel(update.request)
            del self._requests[update.request]
        assert row.is_done or update.reason is None, "a row was left unfinished"

    @property
    def timings(self) -> Timings:
        """What it cost so far."""
        now, before, engine = self._engine.clock, self._before, self._engine
        return Timings(
            num_batches=len(self.rows),
            num_rows=len(self.rows),
            prompt_tokens=sum(map(len, self._prompts)),
            new_tokens=sum(len(row.tokens) for row in self.rows),
            prefill_s=now.read_s - before.read_s,
            first_token_s=0.0,  # it comes with the first decode step
            reused_tokens=now.reused_tokens - before.reused_tokens,
            decode_s=now.decode_s - before.decode_s,
            decode_steps=now.decode_steps - before.decode_steps,
            compile_s=now.compile_s - before.compile_s,
            cache_bytes=engine.cache_bytes,
            cache_bytes_per_row=engine.cache_bytes // self._num_slots,
        )


def _room_for(
    options: GenerateOptions, lengths: Sequence[int], *, streaming: bool
) -> EngineOptions:
    """An engine for prompts of these lengths; rounded, so that others share its programs."""
    chunk_size, page_size = EngineOptions().sizes
    room = max(_LEAST_ROOM, length_bucket(max(lengths) + options.max_new_tokens))
    # Short rows are read in short chunks, of half their room: padding is computed, too.
    chunk_size = max(page_size, min(chunk_size, room // 2 // page_size * page_size))
    num_slots = min(options.batch_size or DEFAULT_BATCH_SIZE, next_power_of_two(len(lengths)))
    # A page more a row than its tokens need, at most; rounded, for fewer programs.
    rows = [length + options.max_new_tokens + page_size for length in sorted(lengths)]
    return EngineOptions(
        num_slots=num_slots,
        max_tokens=room,
        chunk_size=chunk_size,
        page_size=page_size,
        most_pool_tokens=length_bucket(max(sum(rows[-num_slots:]), num_slots * _LEAST_ROOM)),
        chunks_per_round=1 if streaming else None,
        most_snapshots=_MOST_SNAPSHOTS,
        steps_per_call=options.chunk_size,
        steps_at_once=min(STREAM_STEPS, options.chunk_size) if streaming else None,
        positions=options.positions,
    )


def _sampling_params(model: CausalLM, options: GenerateOptions) -> SamplingParams:
    """The options' own, or the checkpoint's."""
    if options.sampling != "checkpoint":
        options.sampling_params.warn_of_unused("options")
        return options.sampling_params
    config = generation_config(model)
    if not config:
        raise ValueError(
            'sampling: expected a model with a generation_config.json for "checkpoint", got none; '
            "give temperature, top_k and top_p instead"
        )
    return SamplingParams.from_generation_config(config)


def context_of(model: CausalLM) -> int | None:
    """Positions that the model was trained on, where its config says so."""
    return getattr(model.config, "max_position_embeddings", None)


def generation_config(model: CausalLM) -> dict[str, object]:
    """The generation config of the directory that the model came from; {} if there is none."""
    source = getattr(model, "source", None)
    return {} if source is None else dict(read_generation_config(source))


def eos_token_ids(model: CausalLM, tok: "PreTrainedTokenizerBase | None") -> tuple[int, ...]:
    """Tokens that end an answer: an override's, the generation config's or the config's, whichever
    comes first; and the tokenizer's. Ids that no token of the model can be are left out.

    Raises:
        ValueError: one that is no token id.

    Examples:
        >>> import swaa_jax as swaa
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> tok.convert_ids_to_tokens(eos_token_ids(model, tok))
        ['<|im_end|>']
    """
    is_overridden = "eos_token_id" in config_overrides(model)
    ids = None if is_overridden else generation_config(model).get("eos_token_id")
    for name in ("eos_token_id", "eos_token_ids"):
        ids = getattr(model.config, name, None) if ids is None else ids
    ids = () if ids is None else (ids,) if isinstance(ids, int) else ids
    own = getattr(tok, "eos_token_id", None)
    ids = list_of(integer(least=0, most=MAX_TOKEN_ID))("eos_token_id", ids)
    ends = {*ids, *(() if own is None else (int(own),))}
    return tuple(sorted(end for end in ends if end < model.config.vocab_size))
