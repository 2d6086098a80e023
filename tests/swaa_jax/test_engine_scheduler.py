"""The engine's decisions, against a model: no page leaks or is written by two, everyone ends."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swaa_jax.engine.pages import PagePool, PrefixCache
from swaa_jax.engine.scheduler import Request, Scheduler

PAGE, CHUNK, SLOTS, PAGES, MAX_TOKENS = 2, 4, 3, 14, 20


class Engine(RuleBasedStateMachine):
    """Prompts of two kinds of tokens, so that many begin alike."""

    has_rings = True

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES, PAGE)
        self.prefixes = PrefixCache(
            self.pool, chunk_size=CHUNK, max_snapshots=2 if self.has_rings else None
        )
        self.scheduler = Scheduler(
            num_slots=SLOTS, max_tokens=MAX_TOKENS, pool=self.pool, prefixes=self.prefixes
        )
        self.waiting: list[int] = []
        self.started: dict[int, Request] = {}
        self.read: dict[tuple[int, ...], bool] = {}  # beginnings that were read, whole chunks

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16), new=st.integers(1, 4))
    def submit(self, tokens, new):
        self.waiting.append(self.scheduler.submit(Request(tokens=tokens, max_new_tokens=new)))

    @rule()
    def admit(self):
        for slot in self.scheduler.admit():
            row = self.scheduler.rows[slot]
            assert row.id == self.waiting.pop(0), "not in order of arrival"
            tokens = row.request.tokens
            assert row.reused.num_tokens < len(tokens)
            assert row.reused.num_tokens % CHUNK == 0
            beginning = tuple(tokens[: row.reused.num_tokens])
            assert not beginning or self.read[beginning]
            if beginning and self.has_rings:
                assert row.reused.snapshot == beginning
            assert list(row.reused.pages) == row.pages[: row.reused.num_tokens // PAGE]
            assert len(row.pages) == -(-(len(tokens) + row.request.max_new_tokens) // PAGE)

    @rule(keeps_rings=st.booleans())
    def read_a_chunk(self, keeps_rings):
        slot = self.scheduler.next_to_read()
        if slot is None:
            return
        row = self.scheduler.rows[slot]
        size = min(CHUNK, len(row.request.tokens) - row.num_read)
        row.num_read += size
        if size == CHUNK:
            so_far = tuple(row.request.tokens[: row.num_read])
            snapshot = so_far if keeps_rings and self.has_rings else None
            pages = row.pages[(row.num_read - CHUNK) // PAGE : row.num_read // PAGE]
            row.place = self.prefixes.keep(row.place, so_far[-CHUNK:], pages, snapshot=snapshot)
            self.read[so_far] = True

    @rule(at=st.integers(0, SLOTS - 1))
    def finish(self, at):
        answering = self.scheduler.answering()
        if answering:
            self.scheduler.finish(answering[at % len(answering)])

    @rule(at=st.integers(0, 5))
    def cancel(self, at):
        ids = [*self.waiting, *(row.id for row in self.scheduler.rows if row)]
        if not ids:
            return
        number = ids[at % len(ids)]
        self.scheduler.cancel(number)
        if number in self.waiting:
            self.waiting.remove(number)
        with pytest.raises(KeyError):
            self.scheduler.cancel(number)

    @invariant()
    def every_page_has_its_holders(self):
        held = collections.Counter()
        for row in self.scheduler.rows:
            held.update(row.pages if row else ())
        for place in self.prefixes._places.values():
            held.update(place.pages)
        assert [self.pool.holders(page) for page in range(PAGES)] == [
            held[page] for page in range(PAGES)
        ]
        assert self.pool.num_free == sum(not held[page] for page in range(PAGES))
        assert len(set(self.pool._free)) == self.pool.num_free

    @invariant()
    def what_is_still_written_has_one_holder(self):
        for row in self.scheduler.rows:
            if row is not None:
                to_come = row.pages[row.num_read // CHUNK * CHUNK // PAGE :]
                assert all(self.pool.holders(page) == 1 for page in to_come)

    @invariant()
    def snapshots_are_bounded(self):
        assert self.prefixes.num_snapshots <= 2

    def teardown(self):
        """Whoever waits gets a slot in the end, and nothing is held once all is let go."""
        for _ in range(500):
            if self.scheduler.is_idle:
                break
            self.admit()
            self.read_a_chunk(True)
            self.finish(0)
        assert self.scheduler.is_idle and not self.waiting
        self.prefixes.clear()
        assert self.pool.num_free == PAGES and not len(self.prefixes)


class EngineWithoutRings(Engine):
    has_rings = False


TestWithRings = Engine.TestCase
TestWithRings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWithoutRings = EngineWithoutRings.TestCase
TestWithoutRings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Kept:
    """What is kept after prompts that came one after the other, from their texts alone.

    Chunks and snapshots by the whole text before their end, each with when it was used last.
    """

    def __init__(self, *, num_pages, max_snapshots, every, tail):
        self.num_pages, self.max_snapshots = num_pages, max_snapshots
        self.every, self.tail = every, tail
        self.chunks: dict[tuple[int, ...], int] = {}
        self.snapshots: dict[tuple[int, ...], int] = {}
        self.time = 0

    def use(self, which, text):
        self.time += 1
        which[text] = self.time

    def goes_first(self, texts):
        return min(texts, key=texts.__getitem__)

    def has_more_behind(self, text):
        return any(len(each) > len(text) and each[: len(text)] == text for each in self.chunks)

    def serve(self, prompt, new):
        """Tokens of the prompt that are reused."""
        last = (len(prompt) - self.tail) // CHUNK * CHUNK
        known = [prompt[:end] for end in range(CHUNK, min(last + 1, len(prompt)), CHUNK)]
        known = [text for text in known if text in self.chunks]
        places = known if self.max_snapshots is None else [t for t in known if t in self.snapshots]
        begin = max(places, key=len, default=())
        for text in known:
            self.use(self.chunks, text)
        if begin in self.snapshots:
            self.use(self.snapshots, begin)
        own = -(-(len(prompt) + new) // PAGE) - len(begin) // PAGE
        while (
            self.num_pages is not None and len(self.chunks) * CHUNK // PAGE + own > self.num_pages
        ):
            can_go = {
                text: time
                for text, time in self.chunks.items()
                if text != begin[: len(text)] and not self.has_more_behind(text)
            }
            gone = self.goes_first(can_go)
            del self.chunks[gone]
            self.snapshots.pop(gone, None)
        for end in range(len(begin) + CHUNK, last + 1, CHUNK):
            self.use(self.chunks, prompt[:end])
            if self.takes_snapshot(end, last):
                self.use(self.snapshots, prompt[:end])
                if len(self.snapshots) > self.max_snapshots:
                    self.let_snapshot_go()
        return len(begin)

    def takes_snapshot(self, end, last):
        return self.max_snapshots is not None and (end == last or end // CHUNK % self.every == 0)

    def let_snapshot_go(self):
        text = self.goes_first(self.snapshots)
        del self.snapshots[text]
        while text and text not in self.snapshots and not self.has_more_behind(text):
            del self.chunks[text]  # nobody can go on from here
            text = text[:-CHUNK]


@st.composite
def prompts_of_chunks(draw):
    """Chunks of two kinds, and some tokens more, so that many prompts begin alike."""
    chunks = draw(st.lists(st.sampled_from([0, 0, 1]), max_size=4))
    rest = draw(st.sampled_from([0, 0, 1, 2]))
    return [kind for kind in chunks for _ in range(CHUNK)] + [2] * (rest or not chunks)


PROMPTS = prompts_of_chunks()


@pytest.mark.parametrize("has_pages, has_rings", [(True, False), (False, True), (True, True)])
@settings(max_examples=150)
@given(
    prompts=st.lists(PROMPTS, max_size=40),
    max_snapshots=st.integers(1, 4),
    every=st.integers(1, 3),
    tail=st.sampled_from([0, 1, 3, 5]),
)
def test_what_was_used_last_goes_last(has_pages, has_rings, prompts, max_snapshots, every, tail):
    """What is reused of each prompt, and what is held in the end, as texts and times say."""
    most = max_snapshots if has_rings else None
    kept = Kept(num_pages=PAGES if has_pages else None, max_snapshots=most, every=every, tail=tail)
    pool = PagePool(PAGES, PAGE) if has_pages else None
    prefixes = PrefixCache(pool, chunk_size=CHUNK, max_snapshots=most, tail=tail)
    scheduler = Scheduler(num_slots=1, max_tokens=MAX_TOKENS, pool=pool, prefixes=prefixes)
    for prompt in map(tuple, prompts):
        scheduler.submit(Request(tokens=prompt, max_new_tokens=2))
        (slot,) = scheduler.admit()
        row = scheduler.rows[slot]
        assert row.reused.num_tokens == kept.serve(prompt, 2)
        assert row.reused.snapshot == (prompt[: row.num_read] or None if has_rings else None)
        last = prefixes.most_kept(len(prompt))
        for end in range(row.num_read + CHUNK, last + 1, CHUNK):
            snapshot = prompt[:end] if kept.takes_snapshot(end, last) else None
            pages = row.pages[(end - CHUNK) // PAGE : end // PAGE]
            row.place = prefixes.keep(
                row.place, prompt[end - CHUNK : end], pages, snapshot=snapshot
            )
            assert row.place is not None
        row.num_read = len(prompt)
        scheduler.finish(slot)
        assert len(prefixes) == len(kept.chunks)
        assert prefixes.num_snapshots == len(kept.snapshots)
        if pool is not None:
            assert pool.num_free == PAGES - len(kept.chunks) * CHUNK // PAGE


@pytest.mark.parametrize("has_rings", [False, True])
def test_what_is_read_again_was_used(has_rings):
    """A prompt of one whole chunk is always read; the one that was not read again goes first."""
    pool = None if has_rings else PagePool(3 * CHUNK // PAGE + 1, PAGE)  # and an answer's page
    prefixes = PrefixCache(pool, chunk_size=CHUNK, max_snapshots=3 if has_rings else None)
    scheduler = Scheduler(num_slots=1, max_tokens=MAX_TOKENS, pool=pool, prefixes=prefixes)

    def serve(*prompt):
        scheduler.submit(Request(tokens=prompt, max_new_tokens=PAGE))
        (slot,) = scheduler.admit()
        row = scheduler.rows[slot]
        reused = row.reused.num_tokens
        if not reused:
            pages = row.pages[: CHUNK // PAGE]
            prefixes.keep(row.place, prompt[:CHUNK], pages, snapshot="it" if has_rings else None)
        scheduler.finish(slot)
        return reused

    zeros, ones, twos, threes = ((kind,) * CHUNK for kind in range(4))
    assert [serve(*each) for each in (zeros, ones, zeros, twos, threes)] == [0] * 5
    assert serve(*zeros, 9) == CHUNK
    assert serve(*ones, 9) == 0


def test_a_row_whose_beginning_was_let_go_keeps_nothing_behind_it():
    """The place that it read up to is gone, and what takes its place later is another."""
    prefixes = PrefixCache(None, chunk_size=CHUNK, max_snapshots=1)
    start = prefixes.find((0,) * 9).place
    place = prefixes.keep(start, (0,) * CHUNK, (), snapshot="zeros")
    assert prefixes.keep(start, (1,) * CHUNK, (), snapshot="ones") is not None
    assert place.snapshot is None, "a place that was let go holds memory"
    assert prefixes.keep(place, (2,) * CHUNK, (), snapshot="behind zeros") is None
    prefixes.keep(start, (0,) * CHUNK, (), snapshot="zeros again")
    assert prefixes.keep(place, (2,) * CHUNK, (), snapshot="behind zeros") is None
    assert prefixes.keep(None, (2,) * CHUNK, ()) is None
    assert len(prefixes) == prefixes.num_snapshots == 1
    (kept,) = prefixes._places.values()
    prefixes.clear()
    assert kept.snapshot is None and not len(prefixes) and not prefixes.num_snapshots


@given(rounds=st.integers(1, 5))
def test_a_prompt_read_twice_is_reused_up_to_its_last_chunk(rounds):
    """13 tokens in chunks of 4: 12 of them; 12 tokens: 8, since the last chunk gives the logits."""
    pool = PagePool(PAGES, PAGE)
    prefixes = PrefixCache(pool, chunk_size=CHUNK, max_snapshots=None)
    tokens = list(range(13))
    pages = pool.allocate(7)
    place = prefixes.find(tokens).place
    for end in (4, 8, 12):
        place = prefixes.keep(place, tokens[end - 4 : end], pages[end // 2 - 2 : end // 2])
    for _ in range(rounds):
        assert prefixes.find(tokens).num_tokens == 12
        assert prefixes.find(tokens[:12]).num_tokens == 8
        assert prefixes.find([*tokens[:6], 99, *tokens[7:]]).num_tokens == 4


@pytest.mark.parametrize(
    "tokens, new, message",
    [
        ((), 1, "a prompt of at least one token, got none"),
        ((5,) * 18, 3, r"at most 20 tokens, which a row has room for, got 18 \+ 3"),
        ((5,) * 12, 3, r"at most 12 tokens, which all pages of the pool hold, got 12 \+ 3"),
    ],
)
def test_what_can_never_fit_is_refused(tokens, new, message):
    pool = PagePool(6, PAGE)
    scheduler = Scheduler(num_slots=1, max_tokens=MAX_TOKENS, pool=pool, prefixes=None)
    with pytest.raises(ValueError, match=message):
        scheduler.submit(Request(tokens=tokens, max_new_tokens=new))
    assert scheduler.is_idle
