"""`Engine`: requests in, tokens out, as many rows at a time as there are slots.

    waiting     r5 r4 r3 | slot 0  r0  [prompt][answer ....
    in order of arrival  | slot 1  r1  [prompt....... reading
                         | slot 2  r2  [prompt][answer done]  <- r3, as soon as its pages are free

A round is: requests into free slots; some chunks of the prompts that are being read, the earliest
first; then some decode steps of all rows that have been read.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from swaa_jax.engine.pages import PagePool
from swaa_jax.engine.sampling import NO_TOKEN, SamplingParams, pack_ids
from swaa_jax.engine.state import (
    NOTHING,
    Chunk,
    DecodeState,
    Drawn,
    RowSettings,
    decode_tokens,
    read_chunk,
)
from swaa_jax.fields import check_fields, integer, or_none
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, split_model
from swaa_jax.runtime import to_host

GREEDY = SamplingParams()

EndReason = Literal["end", "length", "cancelled", "not a number"]
"""Why a request ended: a token that ends it, its longest answer, `cancel`, or bad logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine has room for.

    Attributes:
        num_slots: rows that are answered at a time.
        max_tokens: of a row, prompt and answer together.
        chunk_size: tokens of a prompt that are read at a time.
        page_size: tokens of a page of the full caches; chunks are whole pages.
        num_pages: of the pool; None: as many as all slots can need.
        chunks_per_round: read between two calls of the decode program.
        steps_per_call: decode steps of a call, at most.
    """

    num_slots: int = 8
    max_tokens: int = 4096
    chunk_size: int = 256
    page_size: int = 64
    num_pages: int | None = None
    chunks_per_round: int = 1
    steps_per_call: int = 16

    def __post_init__(self):
        check_fields(
            self,
            num_slots=integer(least=1),
            max_tokens=integer(least=2),
            chunk_size=integer(least=1),
            page_size=integer(least=1),
            num_pages=or_none(integer(least=1)),
            chunks_per_round=integer(least=1),
            steps_per_call=integer(least=1),
        )

    @property
    def columns(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_tokens // self.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be answered.

    Attributes:
        tokens: of the prompt.
        max_new_tokens: the longest answer.
        params: how tokens are drawn.
        seed, number: what draws depend on, besides the position.
        ends: tokens that end the answer.
        logprobs: give log-probabilities, too.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    params: SamplingParams = GREEDY
    seed: int = 0
    number: int = 0
    ends: tuple[int, ...] = ()
    logprobs: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """New tokens of a request.

    Attributes:
        request: its id.
        tokens: the new ones; with the one that ended it.
        logprobs: of the tokens; empty where they were not asked for.
        top_logprobs: of each token, the likeliest ids and their log-probabilities.
        reason: why it ended; None: it goes on.
    """

    request: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    reason: EndReason | None = None


@dataclasses.dataclass(kw_only=True)
class _Row:
    """A request in a slot."""

    id: int
    request: Request
    settings: RowSettings
    pages: list[int]
    read: int = 0
    drawn: int = 0

    @property
    def is_read(self) -> bool:
        return self.read >= len(self.request.tokens)


@dataclasses.dataclass(kw_only=True)
class EngineClock:
    """What was done so far, and how long it took."""

    read_tokens: int = 0
    read_s: float = 0.0
    chunks: int = 0
    new_tokens: int = 0
    decode_s: float = 0.0
    decode_steps: int = 0
    compile_s: float = 0.0


class Engine:
    """Answers requests with one model under its policy.

    Args:
        model: a causal language model, or it split.
        options: what there is room for.

    Examples:
        engine = Engine(model, EngineOptions(num_slots=4))
        engine.submit(Request(tokens=(5, 6, 7), max_new_tokens=20))
        for update in engine.run():
            print(update.request, update.tokens, update.reason)
    """

    def __init__(self, model: CausalLM | SplitModel, options: EngineOptions | None = None):
        self.options = options = options or EngineOptions()
        self._model = model = split_model(model)
        self._vocab_size = model.config.vocab_size
        needs_pages = any(
            layer.needs_full_cache or layer.full_heads or layer.full_attention_tail
            for layer in model.layers or ()
        )
        num_pages = options.num_pages or options.num_slots * options.columns
        self._pool = PagePool(num_pages, options.page_size) if needs_pages else None
        self._state = _empty_state(
            model.arrays,
            structure=model.structure,
            num_slots=options.num_slots,
            max_tokens=options.max_tokens,
            pages=(num_pages, options.page_size) if needs_pages else (1, options.page_size),
            width=options.max_tokens + options.chunk_size,
        )
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._rows: list[_Row | None] = [None] * options.num_slots
        self._ids = itertools.count()
        self.clock = EngineClock()

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all rows."""
        return int(self._state.caches.nbytes)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._waiting and all(row is None for row in self._rows)

    def submit(self, request: Request) -> int:
        """Puts a request behind those that wait; its id.

        Raises:
            ValueError: it can never be answered: no prompt, or more tokens than a row or the pool
                has room for.
        """
        count, limit = len(request.tokens), self.options.max_tokens
        if not count:
            raise ValueError("tokens: expected at least one, got none")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
        total = count + request.max_new_tokens
        if total > limit:
            raise ValueError(
                f"tokens: expected prompt and answer of at most {limit} tokens, which a row has "
                f"room for, got {count} + {request.max_new_tokens}; shorten one, or make the "
                "engine with a larger max_tokens"
            )
        if self._pool is not None and self._pool.pages_for(total) > self._pool.num_pages:
            fits = self._pool.num_pages * self._pool.page_size
            raise ValueError(
                f"tokens: expected prompt and answer of at most {fits} tokens, which all pages "
                f"hold, got {count} + {request.max_new_tokens}; shorten one, or make the engine "
                "with more pages"
            )
        settings = self._settings(request)  # refuses what is out of the vocabulary
        del settings
        number = next(self._ids)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> bool:
        """Ends a request at once and frees its slot and pages; False: it is not here any more."""
        for waiting in self._waiting:
            if waiting[0] == number:
                self._waiting.remove(waiting)
                return True
        for slot, row in enumerate(self._rows):
            if row is not None and row.id == number:
                self._free(slot)
                left = self._state.tokens_left.at[slot].set(0)
                self._state = dataclasses.replace(self._state, tokens_left=left)
                return True
        return False

    def run(self) -> Iterator[Update]:
        """Rounds, until no request is left."""
        while not self.is_idle:
            yield from self.round()

    def round(self) -> list[Update]:
        """One round; what it gave."""
        self._admit()
        updates = []
        for _ in range(self.options.chunks_per_round):
            slot = self._next_to_read()
            if slot is None:
                break
            updates += self._read(slot)
        if any(row is not None and row.is_read for row in self._rows):
            updates += self._decode()
        return updates

    def _admit(self) -> None:
        """In order of arrival: the first one waits for its pages, and the others for it."""
        for slot, row in enumerate(self._rows):
            if row is not None or not self._waiting:
                continue
            number, request = self._waiting[0]
            pages: list[int] | None = []
            if self._pool is not None:
                needed = len(request.tokens) + request.max_new_tokens
                pages = self._pool.allocate(self._pool.pages_for(needed))
            if pages is None:
                return
            self._waiting.popleft()
            self._rows[slot] = _Row(
                id=number, request=request, settings=self._settings(request), pages=pages
            )

    def _next_to_read(self) -> int | None:
        reading = [
            (row.id, slot)
            for slot, row in enumerate(self._rows)
            if row is not None and not row.is_read
        ]
        return min(reading)[1] if reading else None

    def _settings(self, request: Request) -> RowSettings:
        ends = [end for end in request.ends if end < self._vocab_size]
        return RowSettings(
            draws=request.params.for_row(
                self._vocab_size, seed=request.seed, number=request.number
            ),
            ends=pack_ids(
                (end for end in request.ends if end < self._vocab_size), self._vocab_size
            ),
            wants_logprobs=np.bool_(request.logprobs),
        )

    def _read(self, slot: int) -> list[Update]:
        row, size = self._rows[slot], self.options.chunk_size
        assert row is not None
        part = row.request.tokens[row.read : row.read + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(part)] = part
        table = np.zeros((self.options.columns,), np.int32)
        table[: len(row.pages)] = row.pages
        chunk = Chunk(
            slot=np.int32(slot),
            position=np.int32(row.read),
            tokens=tokens,
            length=np.int32(len(part)),
            prompt_length=np.int32(len(row.request.tokens)),
            max_new_tokens=np.int32(row.request.max_new_tokens),
            pages=table,
            settings=row.settings,
        )
        drawn = self._call(_read, chunk)
        row.read += len(part)
        self.clock.read_tokens += len(part)
        self.clock.chunks += 1
        if not row.is_read:
            return []
        return self._take(drawn, [slot], steps=1)

    def _decode(self) -> list[Update]:
        slots = [slot for slot, row in enumerate(self._rows) if row is not None and row.is_read]
        others_wait = bool(self._waiting) or self._next_to_read() is not None
        limit = np.int32(self.options.steps_per_call)
        drawn = self._call(
            _decode, limit, np.bool_(others_wait), max_steps=self.options.steps_per_call
        )
        steps = int(drawn.steps)
        self.clock.decode_steps += steps
        return self._take(drawn, slots, steps=steps)

    def _call(self, program: Any, *args: Any, **static: Any) -> Drawn:
        start = time.perf_counter()
        model = self._model
        self._state, drawn = program(
            model.arrays, self._state, *args, structure=model.structure, **static
        )
        tokens = to_host(drawn.tokens)
        seconds = time.perf_counter() - start
        if program is _read:
            self.clock.read_s += seconds
        else:
            self.clock.decode_s += seconds
        return dataclasses.replace(drawn, tokens=tokens)

    def _take(self, drawn: Drawn, slots: Sequence[int], *, steps: int) -> list[Update]:
        """What came of the rows in these slots; those that ended are gone."""
        tokens = np.asarray(drawn.tokens)
        whole = tokens.ndim == 2
        logprobs = None
        updates = []
        for slot in slots:
            row = self._rows[slot]
            assert row is not None
            ids = tokens[:steps, slot] if whole else tokens
            ids = ids[ids != NOTHING]
            is_bad = bool(len(ids)) and ids[-1] == NO_TOKEN
            new = tuple(map(int, ids[ids != NO_TOKEN]))
            row.drawn += len(new)
            self.clock.new_tokens += len(new)
            reason: EndReason | None = None
            if is_bad:
                reason = "not a number"
            elif new and new[-1] in row.request.ends:
                reason = "end"
            elif row.drawn >= row.request.max_new_tokens:
                reason = "length"
            chosen, top = (), ()
            if row.request.logprobs and new:
                if logprobs is None:
                    logprobs = jax.tree.map(to_host, drawn.logprobs)
                at = (slice(0, len(new)), slot) if whole else slice(0, 1)
                chosen = tuple(map(float, logprobs.chosen[at]))
                top = tuple(
                    tuple(zip(map(int, ids), map(float, values), strict=True))
                    for ids, values in zip(logprobs.top_ids[at], logprobs.top[at], strict=True)
                )
            if reason is not None:
                self._free(slot)
            if new or reason is not None:
                updates.append(
                    Update(
                        request=row.id,
                        tokens=new,
                        logprobs=chosen,
                        top_logprobs=top,
                        reason=reason,
                    )
                )
        return updates

    def _free(self, slot: int) -> None:
        row = self._rows[slot]
        assert row is not None
        if self._pool is not None:
            self._pool.release(row.pages)
        self._rows[slot] = None


_read = jax.jit(read_chunk, static_argnames=("structure",), donate_argnames=("state",))
_decode = jax.jit(
    decode_tokens, static_argnames=("structure", "max_steps"), donate_argnames=("state",)
)


@functools.partial(
    jax.jit, static_argnames=("structure", "num_slots", "max_tokens", "pages", "width")
)
def _empty_state(
    arrays: Any,
    *,
    structure: Any,
    num_slots: int,
    max_tokens: int,
    pages: tuple[int, int],
    width: int,
) -> DecodeState:
    model = structure.build(arrays)
    caches = model.empty_caches(num_slots, cache_size=max_tokens, pages=pages)
    return DecodeState.empty(caches, width=width, vocab_size=model.config.vocab_size)
