"""`serve.Engine`: models by name over one set of weights, arrival, cancelling, refusals, memory."""

import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax import lora
from swaa_jax.arguments import check_model
from swaa_jax.engine import engine as engines
from swaa_jax.engine.memory import Needs, plan_memory
from swaa_jax.serve import Engine, EngineOptions, Request
from tests.support.random_models import HF_CONFIG, random_model

OPTIONS = EngineOptions(num_slots=2, max_tokens=64, chunk_size=16, page_size=8)
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(3, HF_CONFIG["vocab_size"], n).tolist()) for n in (40, 5, 17, 33)]


@functools.cache
def models():
    """One set of weights: full attention, a window, and the window with an adapter."""
    full = random_model(num_hidden_layers=2)
    window = full.with_policy("window=6,sinks=2,full_layers=1::2")
    tuned = swaa.add_lora(window, swaa.LoraConfig(rank=3, alpha=6), rngs=nnx.Rngs(0))
    state = lora.lora_state(tuned)
    leaves, treedef = jax.tree.flatten(state)
    noise = [leaf + 0.3 * RNG.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    tuned = lora.set_adapter(tuned, jax.tree.unflatten(treedef, noise))
    return {"full": full, "window": window, "tuned": tuned}


def request(at, **fields):
    """One of the prompts, for one of the models."""
    asked = {
        "tokens": PROMPTS[at % 4],
        "max_new_tokens": 5 + at % 3,
        "logprobs": True,
        "number": at,
    }
    return Request(**{**asked, **fields})


def answers(engine, numbers):
    """Tokens and log-probabilities of each request."""
    found = {number: ((), ()) for number in numbers}
    for update in engine.run():
        tokens, logprobs = found[update.request]
        found[update.request] = (tokens + update.tokens, logprobs + update.logprobs)
    return [found[number] for number in numbers]


def test_each_name_answers_as_its_model_alone():
    engine = Engine(models(), OPTIONS)
    assert engine.names == ("full", "window", "tuned")
    names = [engine.names[at % 3] for at in range(9)]
    requests = [request(at, model=name) for at, name in enumerate(names)]
    found = answers(engine, [engine.submit(one) for one in requests])
    for name, model in models().items():
        alone = Engine(model, OPTIONS)
        own = [at for at in range(9) if names[at] == name]
        assert [found[at] for at in own] == answers(
            alone, [alone.submit(request(at)) for at in own]
        )
    by_name = [answers(engine, [engine.submit(request(0, model=name))])[0] for name in engine.names]
    assert len(set(by_name)) == 3, "the models answer alike, so that names may be mixed up unseen"
    assert answers(engine, [engine.submit(request(0))])[0] == by_name[0]  # the first is meant


def test_names_that_are_not_there_are_refused():
    engine = Engine({name: models()[name] for name in ("full", "window")}, OPTIONS)
    with pytest.raises(ValueError, match=r"model: expected one of full, window, got 'tuned'"):
        engine.submit(request(0, model="tuned"))
    with pytest.raises(ValueError, match="options: expected keys among full, got 'ful'"):
        Engine({"full": models()["full"]}, {"ful": OPTIONS})
    with pytest.raises(ValueError, match="models: expected at least one, got none"):
        Engine({})


def test_what_can_never_fit_is_refused_and_the_rest_goes_on():
    """By name: the pool of one model holds less than a row of another."""
    small = EngineOptions(
        num_slots=2, max_tokens=64, chunk_size=16, page_size=8, pool_tokens=40, reuse=False
    )
    both = {"full": models()["full"], "other": models()["full"]}
    engine = Engine(both, {"full": small, "other": OPTIONS})
    with pytest.raises(ValueError, match=r"at most 40 tokens, which all pages .* got 40 \+ 5"):
        engine.submit(request(0))
    with pytest.raises(ValueError, match=r"at most 64 tokens, which a row .* got 40 \+ 25"):
        engine.submit(request(0, max_new_tokens=25))
    with pytest.raises(ValueError, match="suppress_tokens: expected token ids from 0 to 60"):
        engine.submit(request(0, params=swaa.GenerateOptions(suppress_tokens=[61])))
    for tokens in ((5, 61), (-1,)):
        with pytest.raises(ValueError, match="tokens: expected ids from 0 to 60, got "):
            engine.submit(request(0, tokens=tokens))
    for name, value in {"seed": -1, "number": 2**31, "max_new_tokens": 0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected an integer"):
            request(0, **{name: value})
    assert engine.is_idle
    fits, elsewhere = engine.submit(request(3)), engine.submit(request(0, model="other"))
    tokens = answers(engine, [fits, elsewhere])
    assert [len(one[0]) for one in tokens] == [5, 5]


def test_no_row_is_longer_than_the_context():
    model = random_model(num_hidden_layers=1, max_position_embeddings=48)
    engine = Engine(model, OPTIONS)
    with pytest.raises(ValueError, match=r"at most 48 tokens, which a row .* got 40 \+ 9"):
        engine.submit(request(0, max_new_tokens=9))
    assert len(answers(engine, [engine.submit(request(0, max_new_tokens=8))])[0][0]) == 8


def test_requests_begin_in_order_of_arrival():
    engine = Engine(models()["window"], EngineOptions(**{**fields(OPTIONS), "num_slots": 1}))
    numbers = [engine.submit(request(at)) for at in range(5)]
    ended = [update.request for update in engine.run() if update.reason is not None]
    assert ended == numbers == sorted(numbers)


def fields(options):
    return {name: getattr(options, name) for name in ("num_slots", "max_tokens", "chunk_size")} | {
        "page_size": options.page_size
    }


@pytest.mark.parametrize("rounds", [0, 1, 2, 4])
def test_a_cancelled_request_is_gone_and_the_others_do_not_notice(rounds):
    """It waits, is being read, or answers; its slot and pages serve those behind it."""
    options = EngineOptions(
        num_slots=1, max_tokens=64, chunk_size=16, page_size=8, steps_per_call=2, reuse=False
    )
    engine = Engine(models()["window"], options)
    gone, stays = engine.submit(request(0, max_new_tokens=20)), engine.submit(request(3))
    for _ in range(rounds):
        assert all(update.request == gone for update in engine.round())
    engine.cancel(gone)
    assert engine.unfinished == {stays}
    with pytest.raises(KeyError):
        engine.cancel(gone)
    alone = Engine(models()["window"], options)
    assert answers(engine, [stays]) == answers(alone, [alone.submit(request(3))])
    waits = [engine.submit(request(at)) for at in (1, 2)]
    engine.cancel(waits[1])
    assert len(answers(engine, waits[:1])[0][0]) == 6
    assert engine.is_idle


def test_reused_tokens_are_told_for_each_request():
    engine = Engine({name: models()[name] for name in ("full", "window")}, OPTIONS)

    def reused(**about):
        number = engine.submit(request(0, **about))
        (told,) = {update.reused_tokens for update in engine.run() if update.request == number}
        return told

    prompt = PROMPTS[0]
    assert reused() == 0
    assert reused() == 32  # of 40, in chunks of 16
    assert reused(model="window") == 0  # another policy's keys are others
    assert reused(model="window") == 32
    assert reused(tokens=(*prompt[:20], 3, *prompt[21:])) == 16  # edited: up to the edit
    assert reused(tokens=prompt[:32]) == 16  # the last chunk gives the logits


MIB = 1 << 20


def needs(name, pages=None, *, fixed=3 * MIB, page=MIB, most=10, snapshots=(0, 0), asked=None):
    """`snapshots`: bytes of one, and how many can be of use; `asked`: how many were asked for."""
    return Needs(
        name=name,
        fixed_bytes=fixed,
        page_bytes=page,
        page_size=8,
        pages=pages,
        most_pages=most,
        snapshot_bytes=snapshots[0],
        snapshots=asked,
        most_snapshots=snapshots[1],
    )


def test_pools_get_what_weights_and_rings_leave():

    def plan(*args, **kwargs):
        return [
            each.pages
            for each in plan_memory(*args, weight_bytes=20 * MIB, memory=100 * MIB, **kwargs)
        ]

    assert plan([needs("a")], share=0.9) == [10]  # no more than it can use
    assert plan([needs("a", most=1000)], share=0.9) == [67]
    assert plan([needs("a", most=1000), needs("b", most=1000)], share=0.9) == [32, 32]
    assert plan([needs("a", most=1000), needs("b", 50)], share=0.9) == [14, 50]
    assert plan([needs("a", most=1000), needs("b", most=5)], share=0.9) == [59, 5]
    assert plan([needs("a", page=0)], share=0.24) == [10]  # rings alone
    rings = needs("a", most=1000, snapshots=(2 * MIB, 16))
    assert plan([rings], share=0.9) == [67 - 16]  # 8 snapshots: a quarter
    with pytest.raises(
        ValueError,
        match=r"pool_tokens: expected at most 504 for 'b', as fit into 0.9 of a device's 0.0977 "
        r"GiB with weights of 0.0195 GiB and rows' own memory of 0.00586 GiB, got 520; ask for ",
    ):
        plan([needs("a"), needs("b", 65)], share=0.9)
    assert plan([needs("a"), needs("b", 63)], share=0.9) == [1, 63]
    with pytest.raises(ValueError, match=r"memory_share: expected room for weights of 0.0195 GiB"):
        plan([needs("a")], share=0.2)
    with pytest.raises(ValueError, match=r"room for a page of 8 tokens .* for 'a' with weights"):
        plan([needs("a")], share=0.235)


def test_snapshots_share_with_pools():
    def plan(*wanted):
        plans = plan_memory(wanted, weight_bytes=20 * MIB, memory=100 * MIB, share=0.9)
        return [(plan.pages, plan.snapshots) for plan in plans]

    two = {"snapshots": (2 * MIB, 100)}
    assert plan(needs("a", most=1000, **two)) == [(51, 8)]  # of 67: a quarter, and the rest
    assert plan(needs("a", most=10, **two)) == [(10, 28)]  # what the pool leaves
    assert plan(needs("a", page=0, **two)) == [(10, 33)]  # rings alone: everything
    assert plan(needs("a", page=0, snapshots=(2 * MIB, 5))) == [(10, 5)]
    assert plan(needs("a", 60, **two)) == [(60, 3)]  # a pool that was asked for comes first
    assert plan(needs("a", most=1000, asked=30, **two)) == [(7, 30)]  # and so do snapshots
    assert plan(needs("a", most=1000, asked=33, **two)) == [(1, 33)]
    assert plan(needs("a", most=1000, asked=30, snapshots=(0, 0))) == [(67, 0)]  # no rings
    assert plan(needs("a", page=0, **two), needs("b", page=0, **two)) == [(10, 16), (10, 16)]
    assert plan(needs("a", page=0, **two), needs("b", most=50)) == [(10, 8), (48, 0)]
    with pytest.raises(
        ValueError,
        match=r"max_snapshots: expected at most 33 for 'a', as fit into 0.9 of .* weights of "
        r"0.0195 GiB and rows' own memory of 0.00293 GiB, got 34; ask for fewer, raise memory_share"
        ", or split",
    ):
        plan(needs("a", most=1000, asked=34, **two))
    with pytest.raises(
        ValueError,
        match=r"at most 3 for 'a', .* 0.00293 GiB, pool_tokens of 'a' of 0.0586 GiB, got 4; ask",
    ):
        plan(needs("a", 60, asked=4, **two))


@given(
    st.lists(
        st.builds(
            needs,
            st.sampled_from("abc"),
            st.none() | st.integers(1, 20),
            fixed=st.integers(0, 40),
            page=st.integers(0, 5),
            most=st.integers(1, 30),
            snapshots=st.sampled_from([(0, 0), (2, 3), (5, 1), (7, 20)]),
            asked=st.none() | st.integers(1, 10),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 60),
    st.integers(1, 400),
    st.sampled_from([0.5, 0.9, 1.0]),
)
def test_plans_fit_and_leave_nothing_that_can_be_used(wanted, weights, memory, share):
    try:
        plans = plan_memory(wanted, weight_bytes=weights, memory=memory, share=share)
    except ValueError:
        return
    fixed = weights + sum(each.fixed_bytes for each in wanted)
    pages = [plan.pages for plan in plans]
    used = sum(each.page_bytes * count for each, count in zip(wanted, pages, strict=True))
    used += sum(
        each.snapshot_bytes * plan.snapshots for each, plan in zip(wanted, plans, strict=True)
    )
    left = int(share * memory) - fixed - used
    assert left >= 0
    # Nobody could have more of it but for the rounding to pages and snapshots.
    rest = sum(each.page_bytes + each.snapshot_bytes for each in wanted) + 2 * len(wanted)
    free = int(share * memory) - fixed  # for those that did not say how many
    for each, plan in zip(wanted, plans, strict=True):
        asked = None if not each.snapshot_bytes else each.snapshots
        assert plan.pages == each.pages or 1 <= plan.pages <= each.most_pages
        assert plan.snapshots == asked or 0 <= plan.snapshots <= each.most_snapshots
        if each.pages is not None and each.page_bytes:
            assert plan.pages == each.pages
            free -= each.page_bytes * each.pages
        elif each.page_bytes and plan.pages < each.most_pages:
            assert left < rest
        if asked is not None:
            assert plan.snapshots == asked
            free -= each.snapshot_bytes * asked
        elif each.snapshot_bytes and plan.snapshots < each.most_snapshots:
            assert left < rest
    # Pools whose slots can need it have three quarters.
    pools = [
        (each, plan.pages)
        for each, plan in zip(wanted, plans, strict=True)
        if each.pages is None and each.page_bytes
    ]
    if any(count < each.most_pages for each, count in pools):
        assert sum(each.page_bytes * count for each, count in pools) > 0.75 * free - rest


def test_the_memory_of_a_device_bounds_the_pool(monkeypatch):
    """What the message says would fit does fit, and one token more does not."""
    model = models()["full"]
    page_bytes = 2 * 2 * 8 * 2 * 16 * 4  # layers, K and V, slots, heads, H, float32
    options = EngineOptions(num_slots=8, max_tokens=256, chunk_size=16, page_size=8)
    lane = engines.Lane.needs(engines.split_model(model), options, name="model")
    assert lane.page_bytes == page_bytes
    weights = engines.bytes_of_arrays(engines.split_model(model).arrays.values())
    room = weights + lane.fixed_bytes + 20 * page_bytes
    monkeypatch.setattr(engines, "device_memory", lambda _: 10 * room)
    engine = Engine(model, options, memory_share=0.1)
    assert engine.cache_bytes == 20 * page_bytes
    with pytest.raises(ValueError, match="at most 160 tokens, which all pages of the pool hold"):
        engine.submit(request(0, max_new_tokens=121))
    for tokens, fits in ((160, True), (161, False)):
        asked = asked_of(options, tokens)
        if fits:
            assert Engine(model, asked, memory_share=0.1).cache_bytes == 20 * page_bytes
            continue
        with pytest.raises(ValueError, match="pool_tokens: expected at most 160 for 'model'"):
            Engine(model, asked, memory_share=0.1)
    # Weights that models share count once.
    both = Engine({"a": model, "b": model}, asked_of(options, 80), memory_share=0.11)
    assert both.cache_bytes == 20 * page_bytes
    with pytest.raises(ValueError, match="memory_share: expected a number above 0 and of at most"):
        Engine(model, options, memory_share=1.5)


def test_the_memory_of_a_device_bounds_snapshots(monkeypatch):
    """Rings alone: all that weights and rings leave, by default; what is said to fit does."""
    model = swaa.AttentionPolicy(window=6, num_sink_tokens=2)
    model = models()["full"].with_policy(model)
    lane = engines.Lane.needs(engines.split_model(model), OPTIONS, name="model")
    assert lane.snapshot_bytes == 2 * 8 * (2 * 2 * 16 + 1) * 4  # layers, slots, K and V, float32
    weights = engines.bytes_of_arrays(engines.split_model(model).arrays.values())
    room = weights + lane.fixed_bytes + 5 * lane.snapshot_bytes
    monkeypatch.setattr(engines, "device_memory", lambda _: 10 * room)
    for options, kept in ((OPTIONS, 5), (dataclasses.replace(OPTIONS, most_snapshots=3), 3)):
        engine = Engine(model, options, memory_share=0.1)
        answers(engine, [engine.submit(request(0, tokens=(at,) * 33)) for at in range(9)])
        assert engine._lanes["model"]._prefixes.num_snapshots == kept
    Engine(model, dataclasses.replace(OPTIONS, max_snapshots=5), memory_share=0.1)
    with pytest.raises(ValueError, match="max_snapshots: expected at most 5 for 'model', as fit"):
        Engine(model, dataclasses.replace(OPTIONS, max_snapshots=6), memory_share=0.1)


def asked_of(options, tokens):
    return EngineOptions(**fields(options), pool_tokens=tokens)


@pytest.mark.parametrize(
    "given_models, message",
    [
        (None, "models: expected a model, got None"),
        ("tiny-retriever", "models: expected a model, got 'tiny-retriever' .*load_model"),
        ({"a": [1]}, r"models: expected a model, got \[1\] .* load_model"),
        ({1: None}, r"models: expected text, got 1 \(int\)"),
    ],
    ids=str,
)
def test_what_is_no_model_is_refused(given_models, message):
    with pytest.raises(ValueError, match=message):
        Engine(given_models, OPTIONS)


def test_what_is_wrong_is_told_with_what_to_do():
    engine = Engine(models(), {name: OPTIONS for name in models()})
    with pytest.raises(ValueError, match=r"got 'windoww' \(did you mean 'window'\?\)"):
        engine.submit(request(0, model="windoww"))
    asked = engine.submit(request(0))
    engine.cancel(asked)
    with pytest.raises(KeyError, match="request: expected the id of one that is left, see unfin"):
        engine.cancel(asked)
    with pytest.raises(ValueError, match=r'got .*; pass its "input_ids"'):
        request(0, tokens={"input_ids": [1, 2], "attention_mask": [1, 1]})
    with pytest.raises(ValueError, match=r"got .*; pass its one row"):
        request(0, tokens=np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="steps_at_once: expected at most steps_per_call=16, got"):
        EngineOptions(steps_at_once=99)
    with pytest.raises(ValueError, match="model: expected a model, got 'tiny-retriever'"):
        check_model("model", "tiny-retriever")


def test_the_options_that_were_chosen_can_be_seen():
    options = dataclasses.replace(OPTIONS, max_tokens=100_000)
    engine = Engine(models()["full"], options)
    assert engine.options["model"].max_tokens == HF_CONFIG["max_position_embeddings"]


def test_the_page_s_example_runs(capsys, monkeypatch):
    """With a small random model in the shipped one's place, which compiles in a quarter of it."""
    small = random_model(num_hidden_layers=2, vocab_size=2304, max_position_embeddings=2048)
    monkeypatch.setattr(swaa, "load_model", lambda *_, **__: small)
    page = pathlib.Path(__file__).parents[2] / "docs" / "engine.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    example = example.replace("enable_compilation_cache()  #", "#")  # the process's own setting
    exec(example, {})
    *answered, reused = capsys.readouterr().out.splitlines()
    assert answered[0].startswith("full ")
    assert reused.endswith("{64}")
