"""`Engine`: requests in, tokens out, as many rows at a time as there are slots.

    waiting     r5 r4 r3 | slot 0  r0  [prompt][answer ....
    in order of arrival  | slot 1  r1  [prompt....... reading
                         | slot 2  r2  [prompt][answer done]  <- r3, as soon as its pages are free

A round is: requests into free slots; some chunks of the prompts that are being read, the earliest
first; then some decode steps of all rows that have been read.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from kernels_pallas.layout import round_up
from swaa_jax.attention import PagedCache, RingCache
from swaa_jax.engine.pages import PagePool, PrefixCache
from swaa_jax.engine.sampling import NO_TOKEN, pack_ids
from swaa_jax.engine.scheduler import Request, Row, Scheduler
from swaa_jax.engine.state import (
    NOTHING,
    Chunk,
    DecodeState,
    Drawn,
    RowSettings,
    decode_tokens,
    put_rings,
    read_chunk,
    stop_row,
    take_rings,
)
from swaa_jax.fields import check_fields, flag, integer, one_of, or_none, set_field
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, jit_by_structure, split_model
from swaa_jax.runtime import to_host

EndReason = Literal["end", "length", "cancelled", "not a number"]
"""Why a request ended: a token that ends it, its longest answer, `cancel`, or bad logits."""


_SIZES = {"cpu": (256, 32), "gpu": (2048, 256), "tpu": (1024, 256)}
"""Tokens of a chunk and of a page, by platform."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine has room for.

    Attributes:
        num_slots: rows that are answered at a time.
        max_tokens: of a row, prompt and answer together.
        chunk_size: tokens of a prompt that are read at a time; None: as many as keep the device
            busy.
        page_size: tokens of a page of the full caches; chunks are whole pages. None: by device.
        num_pages: of the pool; None: as many as all slots can need.
        chunks_per_round: read between two calls of the decode program.
        steps_per_call: decode steps of a call, at most; part of the program.
        steps_at_once: those that are run, for smooth streams; None: as many.
        positions: where new tokens stand; see `CausalLM.prefill`.
        reuse: keep chunks of prompts, for prompts that begin alike.
        max_snapshots: of the rings of windowed layers, which are kept for it.
        snapshot_every: chunks from one to the next, within a prompt; there is one at the end of
            each prompt's last whole chunk in any case.
    """

    num_slots: int = 8
    max_tokens: int = 4096
    chunk_size: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    chunks_per_round: int = 1
    steps_per_call: int = 16
    steps_at_once: int | None = None
    positions: Literal["text", "cache"] = "text"
    reuse: bool = True
    max_snapshots: int = 16
    snapshot_every: int = 8

    def __post_init__(self):
        check_fields(
            self,
            num_slots=integer(least=1),
            max_tokens=integer(least=2),
            chunk_size=or_none(integer(least=1)),
            page_size=or_none(integer(least=1)),
            num_pages=or_none(integer(least=1)),
            chunks_per_round=integer(least=1),
            steps_per_call=integer(least=1),
            steps_at_once=or_none(integer(least=1)),
            positions=one_of("text", "cache"),
            reuse=flag,
            max_snapshots=integer(least=1),
            snapshot_every=integer(least=1),
        )
        chunk_size, page_size = _SIZES.get(jax.default_backend(), _SIZES["tpu"])
        if self.page_size is None:
            set_field(self, "page_size", math.gcd(self.chunk_size or chunk_size, page_size))
        if self.chunk_size is None:
            set_field(self, "chunk_size", round_up(chunk_size, self.sizes[1]))
        if self.sizes[0] % self.sizes[1]:
            raise ValueError(
                f"chunk_size: expected a multiple of page_size={self.page_size}, got "
                f"{self.chunk_size}; change one of them"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a chunk and of a page, as chosen."""
        return self.chunk_size or 0, self.page_size or 0

    @property
    def columns(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_tokens // self.sizes[1])


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
class EngineClock:
    """What was done so far, and how long it took."""

    read_tokens: int = 0
    reused_tokens: int = 0
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
        chunk_size, page_size = options.sizes
        num_pages = options.num_pages or options.num_slots * options.columns
        self._state = _empty_state(
            model.arrays,
            structure=model.structure,
            num_slots=options.num_slots,
            max_tokens=options.max_tokens,
            pages=(num_pages, page_size),
            positions=options.positions,
            width=options.max_tokens + chunk_size,
        )
        parts = [part for layer in self._state.caches.layers for part in layer.parts()]
        has_pages = any(isinstance(part, PagedCache) for part in parts)
        pool = PagePool(num_pages, page_size) if has_pages else None
        self._has_rings = has_rings = any(isinstance(part, RingCache) for part in parts)
        self._prefixes: PrefixCache[Any] | None = None
        if options.reuse:
            self._prefixes = PrefixCache(
                pool,
                chunk_size=chunk_size,
                max_snapshots=options.max_snapshots if has_rings else None,
            )
        self._scheduler = Scheduler(
            num_slots=options.num_slots,
            max_tokens=options.max_tokens,
            pool=pool,
            prefixes=self._prefixes,
        )
        self._compiled: set[Any] = set()
        self.clock = EngineClock()

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all rows."""
        return int(self._state.caches.nbytes)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return self._scheduler.is_idle

    def submit(self, request: Request) -> int:
        """Puts a request behind those that wait; gives its id.

        Raises:
            ValueError: it can never be answered; the message says why.
        """
        self._settings(request)  # refuses what is not in the vocabulary
        return self._scheduler.submit(request)

    def cancel(self, number: int) -> None:
        """Ends a request at once, and frees its slot and pages.

        Raises:
            KeyError: no such request is left.
        """
        slot = self._scheduler.cancel(number)
        if slot is not None:
            self._state = _stop(self._state, np.int32(slot))

    def run(self) -> Iterator[Update]:
        """Rounds, until no request is left."""
        while not self.is_idle:
            yield from self.round()

    def round(self) -> list[Update]:
        """One round; what it gave."""
        updates = []
        for slot in self._scheduler.admit():
            row = self._scheduler.rows[slot]
            assert row is not None
            self.clock.reused_tokens += row.reused.num_tokens
            if row.reused.snapshot is not None:
                self._state = _restore(self._state, np.int32(slot), row.reused.snapshot)
        for _ in range(self.options.chunks_per_round):
            slot = self._scheduler.next_to_read()
            if slot is None:
                break
            updates += self._read(slot)
        if self._scheduler.answering():
            updates += self._decode()
        return updates

    def _settings(self, request: Request) -> RowSettings:
        ends = [end for end in request.ends if end < self._vocab_size]
        return RowSettings(
            draws=request.params.for_row(
                self._vocab_size, seed=request.seed, number=request.number
            ),
            ends=pack_ids(ends, self._vocab_size),
            wants_logprobs=np.bool_(request.logprobs),
        )

    def _read(self, slot: int) -> list[Update]:
        row, size = self._scheduler.rows[slot], self.options.sizes[0]
        assert row is not None
        part = row.request.tokens[row.num_read : row.num_read + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(part)] = part
        pages = np.zeros((self.options.columns,), np.int32)
        pages[: len(row.pages)] = row.pages
        chunk = Chunk(
            slot=np.int32(slot),
            position=np.int32(row.num_read),
            tokens=tokens,
            length=np.int32(len(part)),
            prompt_length=np.int32(len(row.request.tokens)),
            max_new_tokens=np.int32(row.request.max_new_tokens),
            pages=pages,
            settings=self._settings(row.request),
        )
        drawn = self._call(_read, chunk)
        row.num_read += len(part)
        self.clock.read_tokens += len(part)
        self.clock.chunks += 1
        if len(part) == size:
            self._keep(slot, row)
        return self._take(drawn, [slot], steps=1) if row.is_read else []

    def _keep(self, slot: int, row: Row) -> None:
        """Keeps the chunk that was just read; its rings at the prompt's last whole chunk, and now
        and then before.
        """
        if self._prefixes is None:
            return
        size, options = self.options.sizes[0], self.options
        is_last = row.num_read + size > len(row.request.tokens)
        snapshot = None
        if self._has_rings and (is_last or row.num_read // size % options.snapshot_every == 0):
            snapshot = _snapshot(self._state, np.int32(slot))
        self._prefixes.keep(row.request.tokens[: row.num_read], row.pages, snapshot=snapshot)

    def _decode(self) -> list[Update]:
        scheduler = self._scheduler
        others_wait = scheduler.num_waiting > 0 or scheduler.next_to_read() is not None
        most = self.options.steps_per_call
        limit = np.int32(min(self.options.steps_at_once or most, most))
        slots = scheduler.answering()
        drawn = self._call(_decode, limit, np.bool_(others_wait), max_steps=most)
        steps = int(drawn.steps)
        self.clock.decode_steps += steps
        return self._take(drawn, slots, steps=steps)

    def _call(self, program: Any, *args: Any, **static: Any) -> Drawn:
        model = self._model
        given = (model.arrays, self._state, *args)
        static["structure"] = model.structure
        start = time.perf_counter()
        if program not in self._compiled:  # the call then finds it done
            program.lower(*given, **static).compile()
            self._compiled.add(program)
            self.clock.compile_s += time.perf_counter() - start
            start = time.perf_counter()
        self._state, drawn = program(*given, **static)
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
            row = self._scheduler.rows[slot]
            assert row is not None
            ids = tokens[:steps, slot] if whole else tokens
            ids = ids[ids != NOTHING]
            is_bad = bool(len(ids)) and ids[-1] == NO_TOKEN
            new = tuple(map(int, ids[ids != NO_TOKEN]))
            row.num_drawn += len(new)
            self.clock.new_tokens += len(new)
            reason: EndReason | None = None
            if is_bad:
                reason = "not a number"
            elif new and new[-1] in row.request.ends:
                reason = "end"
            elif row.num_drawn >= row.request.max_new_tokens:
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
                self._scheduler.finish(slot)
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


_read = jit_by_structure(read_chunk, donate_argnames=("state",))
_decode = jit_by_structure(
    decode_tokens, static_argnames=("max_steps",), donate_argnames=("state",)
)


_stop, _snapshot = jax.jit(stop_row, donate_argnames=("state",)), jax.jit(take_rings)
_restore = jax.jit(put_rings, donate_argnames=("state",))


@functools.partial(
    jit_by_structure,
    static_argnames=("num_slots", "max_tokens", "pages", "positions", "width"),
)
def _empty_state(
    arrays: Any,
    *,
    structure: Any,
    num_slots: int,
    max_tokens: int,
    pages: tuple[int, int],
    positions: str,
    width: int,
) -> DecodeState:
    model = structure.build(arrays)
    caches = model.empty_caches(num_slots, cache_size=max_tokens, pages=pages, positions=positions)
    return DecodeState.empty(caches, width=width, vocab_size=model.config.vocab_size)
