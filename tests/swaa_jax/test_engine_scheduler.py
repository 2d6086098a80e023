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
            self.prefixes.keep(so_far, row.pages, snapshot=snapshot)
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
        for node in self.prefixes._nodes.values():
            held.update(node.pages)
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


@given(rounds=st.integers(1, 5))
def test_a_prompt_read_twice_is_reused_up_to_its_last_chunk(rounds):
    """13 tokens in chunks of 4: 12 of them; 12 tokens: 8, since the last chunk gives the logits."""
    pool = PagePool(PAGES, PAGE)
    prefixes = PrefixCache(pool, chunk_size=CHUNK, max_snapshots=None)
    tokens = list(range(13))
    pages = pool.allocate(7)
    for end in (4, 8, 12):
        prefixes.keep(tokens[:end], pages)
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
