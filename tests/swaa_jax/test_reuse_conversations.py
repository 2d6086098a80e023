"""Exact reuse: recorded conversations with edits, round robin, against reading every prompt anew.

What could be reused is computed from the texts alone: all prompts that were read before, the size
of a chunk and the rule for snapshots. Nothing of the engine is asked.
"""

import dataclasses
import gc
import itertools

import jax
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.serve import Engine, EngineOptions, Request, SamplingParams
from tests.support.random_models import HF_CONFIG, random_model

CHUNK, PAGE, EVERY, SLOTS, MAX_TOKENS = 16, 8, 3, 8, 384
NUM_CONVERSATIONS, MOST_TURNS = 200, 6
USER, ANSWER = 3, 4  # what a template puts before a message
RINGS = {"window", "1::2", "heads", "positions in the cache"}
TAIL = 21
POLICIES = {
    "full": swaa.AttentionPolicy(),
    "window": swaa.AttentionPolicy(window=12, num_sink_tokens=3),
    "1::2": swaa.AttentionPolicy(window=12, num_sink_tokens=3, full_attention_layers="1::2"),
    "1::2, FA decode": swaa.AttentionPolicy(
        window=12, num_sink_tokens=3, full_attention_layers="1::2", decode="full"
    ),
    "tail": swaa.AttentionPolicy(window=12, num_sink_tokens=3, full_attention_tail=TAIL),
    "heads": swaa.AttentionPolicy(
        window=12, num_sink_tokens=3, full_attention_heads={0: [1], 2: [0]}
    ),
}
POLICIES["positions in the cache"] = POLICIES["window"]


def draw(rng, least, most):
    """So many random tokens, none of the template's."""
    return tuple(rng.integers(5, HF_CONFIG["vocab_size"], rng.integers(least, most + 1)).tolist())


@dataclasses.dataclass
class Conversation:
    """Messages of a user, their answers, and edits of messages that were answered."""

    rng: np.random.Generator
    system: tuple[int, ...]
    num_turns: int
    turns: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def ask(self):
        """The next prompt: a new message, or an earlier one edited."""
        edited = self.rng.random() < 0.3 and self.turns
        if edited:
            at = int(self.rng.integers(len(self.turns)))
            message = draw(self.rng, 3, 30)
            if self.rng.random() < 0.5:  # what came after it is gone
                self.turns = [*self.turns[:at], (message, ())]
                return self.prompt()
            self.turns[at] = (message, self.turns[at][1])
        self.turns.append((draw(self.rng, 3, 30), ()))
        return self.prompt()

    def prompt(self):
        turns = ((USER, *message, ANSWER, *answer) for message, answer in self.turns)
        return self.system + tuple(itertools.chain.from_iterable(turns))

    def answered(self, tokens):
        self.turns[-1] = (self.turns[-1][0], tokens)


def conversations(count):
    rng = np.random.default_rng(18)
    systems = [(), *(draw(rng, size, size) for size in (20, 33, 48, 70))]
    return [
        Conversation(
            np.random.default_rng([18, at]), systems[at % 5], 2 + at % (MOST_TURNS - 1), []
        )
        for at in range(count)
    ]


def engine_of(policy, **fields):
    model = random_model(POLICIES[policy], num_hidden_layers=3, max_position_embeddings=512)
    positions = "cache" if policy == "positions in the cache" else "text"
    options = {"num_slots": SLOTS, "max_tokens": MAX_TOKENS, "chunk_size": CHUNK, "page_size": PAGE}
    return Engine(model, EngineOptions(**options, positions=positions, **fields))


def groups(items):
    """As many at a time as there are slots."""
    return [items[at : at + SLOTS] for at in range(0, len(items), SLOTS)]


def serve(engine, requests):
    """Tokens and log-probabilities of each, and the tokens of its prompt that were reused.

    A group ends before the next begins: what was read before a prompt is then known.
    """
    answers, reused = [], []
    for group in groups(requests):
        numbers = [engine.submit(request) for request in group]
        found = {number: ((), ()) for number in numbers}
        told = {}
        for update in engine.run():
            tokens, logprobs = found[update.request]
            found[update.request] = (tokens + update.tokens, logprobs + update.logprobs)
            told[update.request] = update.reused_tokens
        answers += [found[number] for number in numbers]
        reused += [told[number] for number in numbers]
    return answers, reused


def record(policy, count):
    """Requests and answers of each round; every prompt is read anew."""
    engine, talks, rounds = engine_of(policy, reuse=False), conversations(count), []
    for turn in range(MOST_TURNS):
        asked = [(at, talk) for at, talk in enumerate(talks) if turn < talk.num_turns]
        requests = [
            Request(
                tokens=talk.ask(),
                max_new_tokens=3 + (at + turn) % 8,
                params=SamplingParams(temperature=1.0 if at % 3 else 0.0),
                number=at,
                seed=turn,
                logprobs=True,
            )
            for at, talk in asked
        ]
        answers, reused = serve(engine, requests)
        assert not any(reused)
        for (_, talk), (tokens, _) in zip(asked, answers, strict=True):
            talk.answered(tokens)
        rounds.append((requests, answers))
    return rounds


class Possible:
    """What could be reused if everything that is to be kept is kept."""

    def __init__(self, policy):
        self.has_rings = policy in RINGS
        self.tail = TAIL if policy == "tail" else 0
        self.read = np.zeros((0, MAX_TOKENS), np.int32)
        self.lengths = []

    def of(self, prompt):
        """Whole chunks that an earlier prompt begins with, too, up to a place of its state."""
        row = self.row(prompt)
        best = 0
        common = np.cumprod(self.read == row, axis=1).sum(axis=1)
        for length, alike in zip(self.lengths, common.tolist(), strict=True):
            most = min(alike, len(prompt) - max(1, self.tail))
            best = max([best, *(end for end in self.places(length) if end <= most)])
        return best

    def places(self, length):
        """Ends of the chunks of a prompt at which reading can go on."""
        ends = range(CHUNK, length - self.tail + 1, CHUNK)
        return [end for end in ends if not self.has_rings or self.has_snapshot(end, ends[-1])]

    def has_snapshot(self, end, last):
        return end == last or end % (EVERY * CHUNK) == 0

    def row(self, prompt):
        return np.array([*prompt, *([-len(self.lengths) - 1] * (MAX_TOKENS - len(prompt)))])

    def add(self, prompts):
        rows = []
        for prompt in prompts:
            rows.append(self.row(prompt))
            self.lengths.append(len(prompt))
        self.read = np.concatenate([self.read, rows])


def check(policy, count, **fields):
    """The share that is reused."""
    engine = engine_of(policy, snapshot_every=EVERY, **fields)
    possible, order = Possible(policy), np.random.default_rng(0)
    total = from_others = 0
    for turn, (requests, answers) in enumerate(record(policy, count)):
        shuffled = order.permutation(len(requests)).tolist()  # in other company than before
        found, reused = serve(engine, [requests[at] for at in shuffled])
        for group in groups(list(zip(shuffled, found, reused, strict=True))):
            for at, answer, num_reused in group:
                prompt = requests[at].tokens
                assert answer == answers[at], f"conversation {requests[at].number}, turn {turn}"
                assert num_reused == possible.of(prompt)
                total += len(prompt)
                from_others += num_reused if turn == 0 else 0
            possible.add([requests[at].tokens for at, _, _ in group])
    clock = engine.clock
    assert clock.read_tokens + clock.reused_tokens == total
    assert from_others, "no system prompt was reused"
    return clock.reused_tokens / total


COUNTS = {"window": 24, "1::2, FA decode": 24, "tail": 16}


@pytest.mark.parametrize(
    "policy",
    [pytest.param("window", marks=pytest.mark.slow), "1::2, FA decode", "tail"],
)
def test_what_can_be_reused_is_reused_and_changes_no_bit(policy):
    assert check(policy, COUNTS[policy], pool_tokens=24 * MAX_TOKENS * 3) > 0.4


def test_little_room_changes_no_bit_and_what_was_let_go_is_free():
    """Pages for four of the longest rows in eight slots, and twenty snapshots."""
    policy, count, most = "1::2", 16, 20
    engine = engine_of(
        policy, snapshot_every=1, max_snapshots=most, pool_tokens=SLOTS * MAX_TOKENS // 2
    )
    possible = Possible(policy)
    before, could = num_copies_of_rings(), 0
    for requests, answers in record(policy, count):
        found, _ = serve(engine, requests)
        assert found == answers
        for group in groups(requests):
            could += sum(possible.of(request.tokens) for request in group)
            possible.add([request.tokens for request in group])
    assert 0 < engine.clock.reused_tokens < could
    (lane,) = engine._lanes.values()
    kept = lane._prefixes
    assert kept.num_snapshots == most
    assert num_copies_of_rings() - before == most
    kept.clear()
    assert num_copies_of_rings() == before
    assert lane._scheduler.pool.num_free == SLOTS * MAX_TOKENS // 2 // PAGE


def num_copies_of_rings():
    """In memory, of one row and its two windowed layers."""
    gc.collect()
    positions = [x for x in jax.live_arrays() if x.shape == (1, 15) and x.dtype == np.int32]
    return len(positions) / 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_two_hundred_conversations(policy):
    share = check(policy, NUM_CONVERSATIONS, pool_tokens=NUM_CONVERSATIONS * MAX_TOKENS * 2)
    print(f"{policy}: {share:.1%} of the prompts' tokens reused")
    assert share > 0.4
