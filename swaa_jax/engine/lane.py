"""`Lane`: one model under its policy, with its slots, its pool of pages and its programs.

    waiting     r5 r4 r3 | slot 0  r0  [prompt][answer ....
    in order of arrival  | slot 1  r1  [prompt....... reading
                         | slot 2  r2  [prompt][answer done]  <- r3, as soon as its pages are free

A round is: requests into free slots; some chunks of the prompts that are being read, the earliest
first; then some decode steps of all rows that have been read. Between chunks the host does not
wait, so that the device has the next one when one is done.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from swaa_jax.attention import PagedCache, RingCache
from swaa_jax.engine.memory import Needs, Plan, bytes_of_caches, warn_of_whole_pages
from swaa_jax.engine.options import EngineOptions
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
    read_chunk,
    resume_row,
    take_rings,
)
from swaa_jax.models.function import SplitModel, jit_by_structure
from swaa_jax.runtime import to_host

_CHUNKS_AHEAD = 2
"""Chunks that the host hands out before the device has read the first of them."""

_STAGES = {"read_s": "reading", "decode_s": "generating"}
"""What each of the clock's times is of."""

EndReason = Literal["end", "length", "not a number"]
"""Why a request ended: a token that ends it, its longest answer, or bad logits.

>>> from typing import get_args
>>> get_args(EndReason)
('end', 'length', 'not a number')
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """New tokens of a request.

    Attributes:
        request: its id.
        tokens: the new ones; with the one that ended it.
        logprobs: of the tokens; empty where they were not asked for.
        top_logprobs: of each token, the likeliest ids and their log-probabilities.
        reused_tokens: of the request's prompt, which were read before and were not read anew.
        reason: why it ended; None: it goes on.

    Examples:
        >>> Update(request=0, tokens=(9, 2), reason="end").tokens  # the last of an answer
        (9, 2)
    """

    request: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    reused_tokens: int = 0
    reason: EndReason | None = None


@dataclasses.dataclass(kw_only=True)
class EngineClock:
    """What was done so far, and how long it took: counts of tokens, chunks and steps, and seconds.

    Attributes:
        tell: called with what is begun: "compiling", "reading" a chunk, "generating".

    Examples:
        >>> clock = EngineClock(new_tokens=60, decode_s=1.5)  # of engine.clock
        >>> clock.new_tokens / clock.decode_s  # tokens a second
        40.0
    """

    read_tokens: int = 0
    reused_tokens: int = 0
    read_s: float = 0.0
    chunks: int = 0
    new_tokens: int = 0
    decode_s: float = 0.0
    decode_steps: int = 0
    compile_s: float = 0.0
    tell: Callable[[str], None] = lambda stage: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What one model has to do, at one moment.

    Attributes:
        waiting: requests without a slot.
        slots, slots_in_use: rows at a time, and those that are taken.
        pages, pages_of_rows, pages_kept: of the pool; those that rows hold, and those that rows or
            kept chunks hold.
        snapshots: of rings that are kept.
    """

    waiting: int
    slots: int
    slots_in_use: int
    pages: int
    pages_of_rows: int
    pages_kept: int
    snapshots: int


class Lane:
    """One model's requests.

    Args:
        model: split.
        options: what there is room for.
        plan: what it gets of the memory.
        ids: numbers for requests.
        clock: told what is done.
    """

    def __init__(
        self,
        model: SplitModel,
        options: EngineOptions,
        *,
        plan: Plan,
        ids: Iterator[int],
        clock: EngineClock,
    ):
        self._model, self._options, self._clock = model, options, clock
        chunk_size, page_size = options.sizes
        self._state = _empty_state(model.arrays, **_shapes(model, options, plan.pages))
        self._cache_bytes = bytes_of_caches(self._state.caches, mesh=model.mesh)
        parts = [part for layer in self._state.caches.layers for part in layer.parts()]
        has_pages = any(isinstance(part, PagedCache) for part in parts)
        pool = PagePool(plan.pages, page_size) if has_pages else None
        self._has_rings = has_rings = any(isinstance(part, RingCache) for part in parts)
        self._prefixes: PrefixCache[Any] | None = None
        if has_pages:
            warn_of_whole_pages(model.mesh, page_size)
        if options.reuse and (plan.snapshots or not has_rings):
            windowed = [layer for layer in model.layers or () if not layer.is_full]
            self._prefixes = PrefixCache(
                pool,
                chunk_size=chunk_size,
                max_snapshots=plan.snapshots if has_rings else None,
                tail=max((layer.full_attention_tail for layer in windowed), default=0),
            )
        self._scheduler = Scheduler(
            num_slots=options.num_slots,
            max_tokens=options.max_tokens,
            pool=pool,
            prefixes=self._prefixes,
            ids=ids,
        )
        self._compiled: set[Any] = set()
        self._reading: collections.deque[jax.Array] = collections.deque()
        self._drawing: tuple[Drawn, dict[int, Row]] | None = None

    @staticmethod
    def needs(model: SplitModel, options: EngineOptions, *, name: str) -> Needs:
        """What a lane takes of a device's memory, before anything is allocated."""

        def shapes(options: EngineOptions) -> DecodeState:
            sizes = _shapes(model, options, num_pages=1)
            return jax.eval_shape(functools.partial(_empty_state, **sizes), model.arrays)

        state, row = shapes(options), shapes(dataclasses.replace(options, num_slots=1))
        caches = bytes_of_caches(state.caches, mesh=model.mesh)
        rest = jax.tree.leaves((state.history, state.settings))
        snapshot_bytes = bytes_of_caches(row.caches, mesh=model.mesh).fixed if options.reuse else 0
        most = options.most_snapshots
        return Needs(
            name=name,
            fixed_bytes=caches.fixed + sum(x.size * x.dtype.itemsize for x in rest),
            page_bytes=caches.page,
            page_size=options.sizes[1],
            pages=options.pages,
            most_pages=options.most_pages,
            snapshot_bytes=snapshot_bytes,
            snapshots=options.max_snapshots,
            most_snapshots=min(most, options.pool_chunks) if caches.page else most,
        )

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all rows."""
        return int(self._state.caches.nbytes)

    def row_bytes(self, num_tokens: int) -> int:
        """Of keys and values of a row of so many tokens, on each device."""
        pages = -(-num_tokens // self._options.sizes[1])
        rings = self._cache_bytes.fixed // self._options.num_slots
        return rings + pages * self._cache_bytes.page

    @property
    def load(self) -> Load:
        """What it has to do now, and what is free."""
        scheduler, pool, prefixes = self._scheduler, self._scheduler.pool, self._prefixes
        return Load(
            waiting=scheduler.num_waiting,
            slots=self._options.num_slots,
            slots_in_use=sum(row is not None for row in scheduler.rows),
            pages=0 if pool is None else pool.num_pages,
            pages_of_rows=len({page for row in scheduler.rows if row for page in row.pages}),
            pages_kept=0 if pool is None else pool.num_pages - pool.num_free,
            snapshots=0 if prefixes is None else prefixes.num_snapshots,
        )

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return self._scheduler.is_idle

    def submit(self, request: Request) -> int:
        """Puts a request behind those that wait; gives its id.

        Raises:
            ValueError: it can never be answered; the message says why.
        """
        self._settings(request)  # refuses to suppress what is not in the vocabulary
        most = self._model.config.vocab_size - 1
        for name, ids in (("tokens", request.tokens), ("ends", request.ends)):
            unknown = next((one for one in ids if not 0 <= one <= most), None)
            if unknown is not None:
                raise ValueError(
                    f"{name}: expected ids from 0 to {most}, got {unknown}; does the tokenizer "
                    "belong to the model?"
                )
        return self._scheduler.submit(request)

    def cancel(self, number: int) -> None:
        """Ends a request at once, and frees its slot and pages.

        Raises:
            KeyError: no such request is left.
        """
        self._scheduler.cancel(number)

    def round(self, meanwhile: Callable[[], None]) -> list[Update]:
        """One round; what it gave, an update a request.

        Args:
            meanwhile: called when the device has the chunks, before the steps are handed out: on
                GPUs that alone holds the host until they are done.

        Raises:
            RuntimeError: a step failed before, and took the state of all rows with it.
        """
        if self._state.token.is_deleted():
            raise RuntimeError(
                "engine: expected the state of its rows, got none, since a step failed before; "
                "make another Engine, with less room if memory ran out, and submit again"
            )
        for slot in self._scheduler.admit():
            row = self._scheduler.rows[slot]
            assert row is not None
            self._clock.reused_tokens += row.reused.num_tokens
        for _ in itertools.islice(itertools.count(), self._options.chunks_per_round):
            slot = self._scheduler.next_to_read()
            if slot is None:
                break
            self._read(slot)
        meanwhile()
        return self._decode() if self._drawing or self._scheduler.answering() else []

    def _settings(self, request: Request) -> RowSettings:
        return RowSettings(
            draws=request.params.for_row(
                self._model.config.vocab_size, seed=request.seed, number=request.number
            ),
            ends=pack_ids(request.ends, self._model.config.vocab_size),
            wants_logprobs=np.bool_(request.logprobs),
        )

    def _resume(self, slot: int, row: Row) -> None:
        """Puts a slot where the beginning of its row's prompt was read to before."""
        tokens = np.zeros((self._state.history.tokens.shape[1],), np.int32)
        tokens[: row.num_read] = row.request.tokens[: row.num_read]
        rings = row.reused.snapshot or []
        about = {"structure": self._model.structure, "mesh": self._model.mesh}
        self._state = _resume(self._state, np.int32(slot), tokens, rings, **about)
        row.reused = dataclasses.replace(row.reused, snapshot=None)  # free to go from now on
        row.is_resumed = True

    def _read(self, slot: int) -> None:
        """Reads a chunk."""
        row, size = self._scheduler.rows[slot], self._options.sizes[0]
        assert row is not None
        if row.reused.num_tokens and not row.is_resumed:
            self._resume(slot, row)
        part = row.request.tokens[row.num_read : row.num_read + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(part)] = part
        pages = np.zeros((self._options.columns,), np.int32)
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
        end = self._call(_read, "read_s", chunk)
        row.num_read += len(part)
        self._clock.read_tokens += len(part)
        self._clock.chunks += 1
        if len(part) == size:
            self._keep(slot, row)
        self._reading.append(end)
        self._wait_for_chunks(_CHUNKS_AHEAD)

    def _wait_for_chunks(self, most: int) -> None:
        """Waits until no more chunks than this are on the device."""
        while len(self._reading) > most:
            start = time.perf_counter()
            self._reading.popleft().block_until_ready()
            self._add_seconds("read_s", start)

    def _keep(self, slot: int, row: Row) -> None:
        """Keeps the chunk that was just read; its rings at the last that is kept of the prompt, and
        now and then before.
        """
        if self._prefixes is None or row.place is None:
            return
        (size, page_size), end = self._options.sizes, row.num_read
        most = self._prefixes.most_kept(len(row.request.tokens))
        if end > most:
            return
        place, row.place = row.place, None  # should this fail, nothing more is kept of the prompt
        snapshot = None
        if self._has_rings and (end == most or end // size % self._options.snapshot_every == 0):
            structure = self._model.structure
            snapshot = _snapshot(self._state, np.int32(slot), structure=structure)
        tokens = row.request.tokens[end - size : end]
        pages = row.pages[(end - size) // page_size : end // page_size]
        row.place = self._prefixes.keep(place, tokens, pages, snapshot=snapshot)

    def _decode(self) -> list[Update]:
        """Some steps of all rows that are read; an update a request."""
        if self._drawing is None:
            self._drawing = self._begin_decoding()
        drawn, rows = self._drawing
        start = time.perf_counter()
        drawn = dataclasses.replace(drawn, tokens=to_host(drawn.tokens))
        self._add_seconds("decode_s", start)
        self._drawing = None  # not before: whoever interrupts the wait finds the tokens later
        steps = int(drawn.steps)
        self._clock.decode_steps += steps
        return self._take(drawn, rows, steps=steps)

    def _begin_decoding(self) -> tuple[Drawn, dict[int, Row]]:
        """Hands some steps out; what they draw, and the rows that it is of."""
        self._wait_for_chunks(0)
        scheduler = self._scheduler
        is_reading = scheduler.next_to_read() is not None
        others_wait = scheduler.num_waiting > 0 or is_reading
        rows = {slot: row for slot in scheduler.answering() if (row := scheduler.rows[slot])}
        most = self._options.steps_per_call
        steps = self._options.steps_at_once or most
        # Another call costs all rows about a step; the first token is waited for by its row alone.
        if sum(not row.num_drawn for row in rows.values()) * (steps - 1) > len(rows):
            steps = 1
        if is_reading:
            steps = self._options.steps_while_reading
        limit = np.int32(min(steps, most))
        answering = np.zeros((self._options.num_slots,), bool)
        answering[list(rows)] = True
        drawn = self._call(
            _decode, "decode_s", answering, limit, np.bool_(others_wait), max_steps=most
        )
        return drawn, rows

    def _call(self, program: Any, field: str, *args: Any, **static: Any) -> Any:
        """Hands a step out; the clock's field is told how long that took."""
        model, stage = self._model, _STAGES[field]
        given = (model.arrays, self._state, *args)
        static["structure"] = model.structure
        start = time.perf_counter()
        if program not in self._compiled:  # the call then finds it done
            self._clock.tell("compiling")
            program.lower(*given, **static).compile()
            self._compiled.add(program)
            self._clock.compile_s += time.perf_counter() - start
            start = time.perf_counter()
        self._clock.tell(stage)
        self._state, drawn = program(*given, **static)
        self._add_seconds(field, start)
        return drawn

    def _add_seconds(self, field: str, start: float) -> None:
        seconds = getattr(self._clock, field) + time.perf_counter() - start
        setattr(self._clock, field, seconds)

    def _take(self, drawn: Drawn, rows: Mapping[int, Row], *, steps: int) -> list[Update]:
        """What came of the rows in their slots; those that ended are gone."""
        tokens = np.asarray(drawn.tokens)
        logprobs = None
        updates = []
        for slot, row in rows.items():
            if self._scheduler.rows[slot] is not row:  # cancelled since
                continue
            ids = tokens[:steps, slot]
            ids = ids[ids != NOTHING]
            is_bad = bool(len(ids)) and ids[-1] == NO_TOKEN
            new = tuple(map(int, ids[ids != NO_TOKEN]))
            row.num_drawn += len(new)
            self._clock.new_tokens += len(new)
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
                at = (slice(0, len(new)), slot)
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
                        reused_tokens=row.reused.num_tokens,
                        reason=reason,
                    )
                )
        return updates


_read = jit_by_structure(read_chunk, donate_argnames=("state",))
_decode = jit_by_structure(
    decode_tokens, static_argnames=("max_steps",), donate_argnames=("state",)
)
_snapshot = jit_by_structure(take_rings)
_resume = jit_by_structure(resume_row, static_argnames=("mesh",), donate_argnames=("state",))


def _shapes(model: SplitModel, options: EngineOptions, num_pages: int) -> dict[str, Any]:
    """What says how large a lane's state is."""
    chunk_size, page_size = options.sizes
    return {
        "structure": model.structure,
        "num_slots": options.num_slots,
        "max_tokens": options.max_tokens,
        "pages": (num_pages, page_size),
        "positions": options.positions,
        "width": options.max_tokens + chunk_size,
    }


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
    state = DecodeState.empty(caches, width=width, model=model)
    return state.placed(model.mesh)
