"""The engine against whole rows: tokens, bits in any company, reuse, programs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams, compile_counts
from swaa_jax.memory import DeviceMemoryError
from tests.support.compiles import counted
from tests.support.random_models import HF_CONFIG, random_model

VOCAB = HF_CONFIG["vocab_size"]
WIDTH = 96
OPTIONS = EngineOptions(num_slots=3, max_tokens=WIDTH, chunk_size=16, page_size=8, pool_tokens=240)
POLICIES = {
    "full": swaa.AttentionPolicy(),
    "window": swaa.AttentionPolicy(window=5, num_sink_tokens=2),
    "1::2": swaa.AttentionPolicy(window=6, num_sink_tokens=2, full_attention_layers="1::2"),
    "FA decode": swaa.AttentionPolicy(window=5, num_sink_tokens=2, decode="full"),
    "tail": swaa.AttentionPolicy(window=6, num_sink_tokens=2, full_attention_tail=9),
    "heads": swaa.AttentionPolicy(
        window=7, num_sink_tokens=2, full_attention_heads={0: [1], 2: [0]}
    ),
}
POLICIES["experts"] = POLICIES["1::2"]
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
}
QUICK = {"1::2", "FA decode", "experts"}


def some(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@functools.cache
def prompts(seed: int = 0):
    rng = np.random.default_rng(seed)
    sizes = (5, 40, 17, 1, 33, 64, 8, 16, 32)
    return [tuple(rng.integers(3, VOCAB, size).tolist()) for size in sizes]


def answers(engine, requests):
    """Tokens, log-probabilities and reason of each request."""
    ids = [engine.submit(request) for request in requests]
    tokens = {number: [] for number in ids}
    logprobs = {number: [] for number in ids}
    reasons = {}
    for update in engine.run():
        tokens[update.request] += update.tokens
        logprobs[update.request] += update.logprobs
        if update.reason is not None:
            assert update.request not in reasons
            reasons[update.request] = update.reason
    assert set(reasons) == set(ids)
    return [(tuple(tokens[n]), tuple(logprobs[n]), reasons[n]) for n in ids]


def greedily(model, prompt, count):
    """Whole rows, run anew for each token."""
    run = jax.jit(
        lambda tokens, lengths, stages: model(
            tokens, lengths=lengths, stage_ids=stages, logits_at="last"
        )
    )
    tokens = list(prompt)
    for _ in range(count):
        row, stages = np.zeros((1, WIDTH), np.int32), np.zeros((1, WIDTH), np.int32)
        row[0, : len(tokens)] = tokens
        stages[0, len(prompt) :] = swaa.Stage.ANSWER
        tokens.append(int(np.argmax(run(row, np.array([len(tokens)]), stages)[0])))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("policy", some(POLICIES))
def test_tokens_are_those_of_whole_rows(policy):
    """Nine prompts in three slots, whose pages suffice for two of the longest."""
    model = model_of(policy)
    found = answers(
        Engine(model, OPTIONS), [Request(tokens=one, max_new_tokens=9) for one in prompts()]
    )
    for prompt, (tokens, _, reason) in zip(prompts(), found, strict=True):
        assert tokens == greedily(model, prompt, 9)
        assert reason == "length"


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=7, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.7, min_p=0.05),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(frequency_penalty=0.7, no_repeat_ngram_size=2),
    SamplingParams(temperature=1.0, suppress_tokens=tuple(range(0, VOCAB, 2))),
]


def request(at: int) -> Request:
    """A request of many: every third begins as another one does, for two chunks."""
    prompt = prompts()[at % 9]
    if at % 3 == 2:
        prompt = (*prompts()[5][:32], *prompt[:20])
    return Request(
        tokens=prompt,
        max_new_tokens=1 + at % 7,
        params=PARAMS[at % len(PARAMS)],
        seed=at,
        number=at,
        ends=(3, 11, 40) if at % 4 == 0 else (),
        logprobs=at % 2 == 0,
    )


@functools.cache
def model_of(policy):
    experts = EXPERTS if policy == "experts" else {}
    return random_model(POLICIES[policy], num_hidden_layers=3, **experts)


@functools.cache
def alone(policy, at):
    """What the request gives in an engine of its own, without reuse."""
    options = {**{f: getattr(OPTIONS, f) for f in ("num_slots", "max_tokens")}, "chunk_size": 16}
    engine = Engine(
        model_of(policy), EngineOptions(**options, page_size=8, pool_tokens=240, reuse=False)
    )
    return answers(engine, [request(at)])[0]


@pytest.mark.parametrize("policy", some(POLICIES))
@settings(max_examples=6, deadline=None)
@given(
    order=st.lists(st.integers(0, 20), min_size=2, max_size=16),
    steps=st.sampled_from([1, 4, 16]),
    chunks=st.sampled_from([1, 3, None]),
)
def test_company_order_and_reuse_change_no_bit(policy, order, steps, chunks):
    """Tokens and log-probabilities, equal to the bit."""
    options = EngineOptions(
        num_slots=3,
        max_tokens=WIDTH,
        chunk_size=16,
        page_size=8,
        pool_tokens=240,
        steps_per_call=16,
        chunks_per_round=chunks,
        max_snapshots=3,
        snapshot_every=1,
    )
    engine = Engine(model_of(policy), options)
    found = answers(engine, [request(at) for at in order])
    for at, one in zip(order, found, strict=True):
        assert one == alone(policy, at), f"request {at} of {order}"


def test_penalties_read_what_was_reused():
    """Three slots, each left to another prompt in between."""
    params = SamplingParams(frequency_penalty=0.9, repetition_penalty=1.4, no_repeat_ngram_size=1)
    asked = Request(tokens=prompts()[1], max_new_tokens=12, params=params)
    others = [Request(tokens=one, max_new_tokens=2) for one in prompts()[2:8]]
    engine = Engine(model_of("1::2"), OPTIONS)
    (first,) = answers(engine, [asked])
    answers(engine, others)
    engine.clock.reused_tokens = 0
    (again,) = answers(engine, [asked])
    assert engine.clock.reused_tokens == 32
    assert again == first
    assert not {*again[0]} & {*asked.tokens}


@pytest.mark.parametrize("policy", ["1::2", "FA decode"])
def test_four_programs_for_any_lengths_settings_and_ends(policy):
    """Reading, decoding, and two copies of rings for reuse; cancelling takes none."""
    model = random_model(POLICIES[policy], num_hidden_layers=2, vocab_size=67)
    before = compile_counts()
    engine = Engine(model, OPTIONS)
    requests = [dataclasses.replace(request(at), ends=range(at % 5, 60, 7)) for at in range(30)]
    with counted() as compiles:
        answers(engine, requests[:21])
        for one in requests:
            number = engine.submit(one)
            for _ in range(number % 5):
                engine.round()
            if number % 2 and number in engine.unfinished:
                engine.cancel(number)
        assert engine.unfinished
        for _ in engine.run():
            pass
        answers(engine, requests[21:])
    assert engine.clock.reused_tokens > 0
    assert compiles.count == (4 if policy == "1::2" else 3)
    after = compile_counts()
    assert {name: after[name] - before.get(name, 0) for name in after} == {"read": 1, "decode": 1}


def test_answers_go_on_while_a_prompt_is_read():
    """A round is a chunk and a step of all rows: streams stop for no prompt, however long. Nor does
    a first token wait for the sixteen of a call.
    """
    engine = Engine(model_of("1::2"), dataclasses.replace(OPTIONS, reuse=False))
    short = engine.submit(Request(tokens=prompts()[0], max_new_tokens=40))
    (begun,) = engine.round()
    long = engine.submit(Request(tokens=prompts()[5], max_new_tokens=2))  # four chunks of 16
    given = []
    while long in engine.unfinished:
        before = dataclasses.replace(engine.clock)
        updates = {update.request: update for update in engine.round()}
        if long not in updates:
            given.append(len(updates[short].tokens))
            assert engine.clock.chunks == before.chunks + 1
        read = engine.clock.read_tokens - before.read_tokens
        assert read <= 16, "the budget of a round: a chunk, and a token of each row"
    assert begun.request == short and len(begun.tokens) == 1 and given == [1] * 3


def test_a_first_token_comes_alone_where_that_is_worth_a_call():
    """It saves each new row the other steps, and costs all rows about one."""
    engine = Engine(
        model_of("1::2"), dataclasses.replace(OPTIONS, num_slots=4, steps_per_call=3, reuse=False)
    )

    def first_tokens(count):
        asked = [
            engine.submit(Request(tokens=prompts()[0], max_new_tokens=80, number=number))
            for number in range(count)
        ]
        while True:
            counts = {one.request: len(one.tokens) for one in engine.round()}
            if asked[-1] in counts:
                return [counts.get(one) for one in asked]

    assert first_tokens(1) == [1]  # 2 steps saved, 1 row waits
    engine.round()
    assert first_tokens(1) == [3]  # 2 steps saved, 2 rows wait


def test_what_need_not_hold_up_the_device_is_called_once_a_round():
    engine = Engine({"a": model_of("1::2"), "b": model_of("1::2")}, OPTIONS)
    called = []
    engine.round(meanwhile=lambda: called.append("idle"))
    for name in ("a", "b"):
        engine.submit(Request(tokens=prompts()[0], max_new_tokens=2, model=name))
    while not engine.is_idle:
        before = len(called)
        engine.round(meanwhile=lambda: called.append("busy"))
        assert len(called) == before + 1
    for lane in engine._lanes.values():
        jax.tree.map(lambda x: x.delete(), lane._state)
    engine.submit(Request(tokens=prompts()[0], max_new_tokens=2))
    with pytest.raises(RuntimeError, match="a step failed before"):
        engine.round(meanwhile=lambda: called.append("failed"))
    assert (called[0], called[-1]) == ("idle", "failed")


def test_rows_that_ended_hold_nothing_that_is_read():
    engine = Engine(model_of("FA decode"), OPTIONS)
    requests = [
        Request(tokens=prompts()[at], max_new_tokens=2 + 30 * (at == 2)) for at in (1, 5, 2)
    ]
    ids = [engine.submit(request) for request in requests]
    while engine.unfinished != {ids[2]}:
        engine.round()
    for _ in range(2):  # its first token comes alone
        engine.round()
    (lane,) = engine._lanes.values()
    assert lane._state.caches.pos_B[:2].tolist() == [0, 0]
    assert lane._state.caches.pos_B[2] > len(prompts()[2])


def test_requests_are_what_they_were_when_they_were_made():
    """A caller may go on with its list, as chats do; and no token below 0 ends an answer."""
    ids = list(prompts()[1])
    (want,) = answers(Engine(model_of("1::2"), OPTIONS), [Request(tokens=ids, max_new_tokens=6)])
    engine = Engine(model_of("1::2"), OPTIONS)
    engine.submit(Request(tokens=ids, max_new_tokens=6))
    found = []
    for update in engine.run():
        found += update.tokens
        ids += update.tokens
        ids[0] = 0
    assert tuple(found) == want[0]
    with pytest.raises(ValueError, match=r"ends\[0\]: expected .*, got -1"):
        Request(tokens=[1], max_new_tokens=1, ends=[-1])


def test_a_request_that_waits_lets_nothing_go_in_vain():
    options = dataclasses.replace(OPTIONS, num_slots=2, pool_tokens=120)
    engine = Engine(model_of("FA decode"), options)
    answers(engine, [Request(tokens=prompts()[1], max_new_tokens=2)])  # two chunks are kept
    engine.submit(Request(tokens=prompts()[4], max_new_tokens=30))
    engine.round()
    (lane,) = engine._lanes.values()
    kept = len(lane._prefixes)
    engine.submit(Request(tokens=prompts(1)[5], max_new_tokens=32))  # must wait for the other
    engine.round()
    assert len(lane._prefixes) >= kept
    assert [update.reason for update in engine.run() if update.reason] == ["length"] * 2


@pytest.mark.parametrize("policy", ["1::2", "FA decode"])
def test_rows_may_be_shorter_than_a_chunk_is_by_default(policy):
    want = alone(policy, 0)
    options = EngineOptions(num_slots=3, max_tokens=40, page_size=8)
    assert options.chunk_size == 40
    (found,) = answers(Engine(model_of(policy), options), [request(0)])
    assert found[0] == want[0]
    assert EngineOptions(chunk_size=64, page_size=8).within(50).chunk_size == 56
    with pytest.raises(
        ValueError, match="chunk_size: expected no more than max_tokens=40 in whole"
    ):
        EngineOptions(max_tokens=40, chunk_size=64, page_size=8)


@pytest.mark.parametrize(
    "tokens", [[[1, 2]], np.zeros((3, 3), int), [1.5], ["a"], 5, None, [[1], [2, 3]]], ids=str
)
def test_prompts_are_one_row_of_ids(tokens):
    with pytest.raises(ValueError, match="tokens: expected the token ids of one prompt, got"):
        Request(tokens=tokens, max_new_tokens=1)


def test_an_interrupt_while_tokens_are_awaited_loses_none(monkeypatch):
    engine = Engine(model_of("1::2"), dataclasses.replace(OPTIONS, steps_per_call=4))
    asked = Request(tokens=prompts()[1], max_new_tokens=12)
    (want,) = answers(Engine(model_of("1::2"), OPTIONS), [asked])
    engine.submit(asked)
    waited, found = [], []

    def interrupted(array):
        waited.append(array)
        if len(waited) == 2:
            raise KeyboardInterrupt
        return np.asarray(array)

    monkeypatch.setattr("swaa_jax.engine.lane.to_host", interrupted)
    while not engine.is_idle:
        try:
            found += [token for update in engine.round() for token in update.tokens]
        except KeyboardInterrupt:
            continue
    assert tuple(found) == want[0] and len(waited) > 2


def test_who_stops_looking_finds_the_rest_later():
    engine = Engine(model_of("1::2"), dataclasses.replace(OPTIONS, chunks_per_round=None))
    first, second, third = (
        engine.submit(Request(tokens=prompts()[at], max_new_tokens=1)) for at in (0, 2, 6)
    )
    seen = [next(engine.run()).request]
    engine.cancel(third)  # which has ended, unseen
    seen += [update.request for update in engine.run()]
    assert seen == [first, second]


def test_ends_are_of_the_vocabulary():
    engine = Engine(model_of("1::2"), OPTIONS)
    with pytest.raises(ValueError, match=rf"ends: expected ids from 0 to {VOCAB - 1}, got {VOCAB}"):
        engine.submit(Request(tokens=(1,), max_new_tokens=1, ends=[2, VOCAB]))
    assert engine.is_idle


def test_an_engine_whose_step_failed_says_so(monkeypatch):
    """A program takes the state when it is handed out; an error in it leaves none."""
    engine = Engine(model_of("1::2"), OPTIONS)
    answers(engine, [request(0)])
    engine.submit(request(1))
    (lane,) = engine._lanes.values()

    def out_of_memory(arrays, state, *args, **static):
        jax.tree.map(lambda x: x.delete(), state)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("swaa_jax.engine.lane._read", out_of_memory)
    lane._compiled.add(out_of_memory)
    with pytest.raises(DeviceMemoryError, match="max_tokens: expected rows that fit"):
        engine.round()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"engine: expected the state .* make another Engine"):
        engine.round()
