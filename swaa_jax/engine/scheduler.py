"""Which request runs in which slot, with which pages: decisions on the host, no arrays."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from swaa_jax.arguments import told_keywords
from swaa_jax.engine.pages import PagePool, Place, PrefixCache, Reused
from swaa_jax.engine.sampling_params import SamplingParams
from swaa_jax.fields import check_fields, flag, integer, list_of, or_none, set_field, text, wrong

GREEDY = SamplingParams()


@told_keywords({"max_tokens": "max_new_tokens", "prompt": "tokens", "sampling_params": "params"})
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
        model: which of an engine's models answers; None: its first.

    Raises:
        ValueError: a value out of range. Prompts are looked at when they are submitted.

    Examples:
        >>> request = Request(tokens=[5, 6, 7], max_new_tokens=20, ends=[2])
        >>> request.tokens, request.params.temperature
        ((5, 6, 7), 0.0)
    """

    tokens: Sequence[int]
    max_new_tokens: int
    params: SamplingParams = GREEDY
    seed: int = 0
    number: int = 0
    ends: Sequence[int] = ()
    logprobs: bool = False
    model: str | None = None

    def __post_init__(self):
        check_fields(
            self,
            ends=list_of(integer(least=0)),
            max_new_tokens=integer(least=1),
            seed=integer(least=0, most=2**32 - 1),
            number=integer(least=0, most=2**31 - 1),
            logprobs=flag,
            model=or_none(text),
        )
        set_field(self, "tokens", _ids_of(self.tokens))  # the caller may go on with its list
        if not isinstance(self.params, SamplingParams):
            raise wrong("params", "SamplingParams", self.params)


def _ids_of(tokens: Any) -> tuple[int, ...]:
    """The ids of a list or array, as they are now; whether they are in the vocabulary is not known.

    Raises:
        ValueError: they are not integers in one row.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError:  # rows of several lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        has_ids = isinstance(tokens, Mapping) and "input_ids" in tokens
        advice = 'pass its "input_ids"' if has_ids else ""
        if ids.ndim == 2 and len(ids) == 1:
            advice = "pass its one row"
        raise wrong("tokens", "the token ids of one prompt", tokens, advice)
    found: Any = ids.tolist()
    return tuple(found)


@dataclasses.dataclass(kw_only=True)
class Row:
    """A request in a slot.

    Attributes:
        id: the request's.
        request: the request.
        pages: that it holds, for its prompt and its longest answer.
        reused: the beginning of its prompt that was read before.
        place: where what is read next is kept behind; None: it is not kept.
        num_read: tokens of the prompt that the caches hold.
        is_resumed: the slot holds what is reused.
        num_drawn: new tokens so far.
    """

    id: int
    request: Request
    pages: list[int]
    reused: Reused[Any]
    place: Place[Any] | None
    num_read: int
    num_drawn: int = 0
    is_resumed: bool = False

    @property
    def is_read(self) -> bool:
        """Whether the prompt is read, so that tokens can be drawn."""
        return self.num_read >= len(self.request.tokens)


class Scheduler:
    """Requests in order of arrival: the first waits for a slot and its pages, all others for it.

    A request gets the pages of its prompt and its longest answer when it starts, so that it never
    fails half-way.

    Args:
        num_slots: rows at a time.
        max_tokens: of a row, prompt and answer together.
        pool: of pages; None: rows need none.
        prefixes: what is kept of prompts that were read; None: nothing.
        ids: numbers for requests, which others may draw from, too; None: 0, 1, ...
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_tokens: int,
        pool: PagePool | None,
        prefixes: PrefixCache[Any] | None,
        ids: Iterator[int] | None = None,
    ):
        self.rows: list[Row | None] = [None] * num_slots
        self.pool = pool
        self._max_tokens, self._prefixes = max_tokens, prefixes
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._ids = itertools.count() if ids is None else ids

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._waiting and not any(self.rows)

    def submit(self, request: Request) -> int:
        """Puts a request behind those that wait; gives its id.

        Raises:
            ValueError: it can never be answered: no prompt, or more tokens than a row or the pool
                has room for.
        """
        count, new = len(request.tokens), request.max_new_tokens
        if not count:
            raise ValueError("tokens: expected a prompt of at least one token, got none")
        if count + new > self._max_tokens:
            raise ValueError(
                f"tokens: expected prompt and answer of at most {self._max_tokens} tokens, which a "
                f"row has room for, got {count} + {new}; shorten one, or raise max_tokens if the "
                "model's context is longer"
            )
        if self.pool is not None and self.pool.pages_for(count + new) > self.pool.num_pages:
            fits = self.pool.num_pages * self.pool.page_size
            raise ValueError(
                f"tokens: expected prompt and answer of at most {fits} tokens, which all pages of "
                f"the pool hold, got {count} + {new}; shorten one, give the pool more, or window "
                "more layers, without FA decode"
            )
        number = next(self._ids)
        self._waiting.append((number, request))
        return number

    def admit(self) -> list[int]:
        """Puts requests that wait into free slots, as long as the first one's pages are free.

        Returns:
            the slots, whose rows may begin with `reused` tokens.
        """
        slots = []
        for slot, row in enumerate(self.rows):
            if row is not None:
                continue
            if not self._waiting:
                break
            number, request = self._waiting[0]
            reused = Reused[Any]()
            if self._prefixes is not None:
                reused = self._prefixes.find(request.tokens)
            pages = self._pages_for(request, reused)
            if pages is None:
                break
            self._waiting.popleft()
            self.rows[slot] = Row(
                id=number,
                request=request,
                pages=pages,
                reused=reused,
                place=reused.place,
                num_read=reused.num_tokens,
            )
            slots.append(slot)
        return slots

    def _pages_for(self, request: Request, reused: Reused[Any]) -> list[int] | None:
        pool = self.pool
        if pool is None:
            return []
        count = pool.pages_for(len(request.tokens) + request.max_new_tokens) - len(reused.pages)
        pool.hold(reused.pages)  # first, so that making room does not let them go
        if self._prefixes is not None and pool.num_free < count:
            self._prefixes.make_room(count)
        own = pool.allocate(count)
        if own is None:
            pool.release(reused.pages)
            return None
        return [*reused.pages, *own]

    def next_to_read(self) -> int | None:
        """The slot of the earliest request whose prompt is not read."""
        reading = [(row.id, at) for at, row in enumerate(self.rows) if row and not row.is_read]
        return min(reading)[1] if reading else None

    def answering(self) -> list[int]:
        """Slots of rows that draw tokens."""
        return [slot for slot, row in enumerate(self.rows) if row and row.is_read]

    def finish(self, slot: int) -> None:
        """Frees a slot and its pages."""
        row = self.rows[slot]
        assert row is not None
        if self.pool is not None:
            self.pool.release(row.pages)
        self.rows[slot] = None

    def cancel(self, number: int) -> int | None:
        """Ends a request; gives the slot that it was in, None where it was in none.

        Raises:
            KeyError: no such request is left.
        """
        for waiting in self._waiting:
            if waiting[0] == number:
                self._waiting.remove(waiting)
                return None
        for slot, row in enumerate(self.rows):
            if row is not None and row.id == number:
                self.finish(slot)
                return slot
        raise KeyError(number)
