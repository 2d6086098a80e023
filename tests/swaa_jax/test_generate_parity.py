"""Generation with real models: Transformers' own answers, and the policies' stages and caches."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
import swaa_jax.sharding as swaa_sharding
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.infer import compile_counts, generate
from swaa_jax.infer.buckets import pad_right
from swaa_jax.policy import Stage

tiny_hf = pytest.importorskip("tests.support.tiny_hf")
torch = pytest.importorskip("torch")

NEW = 24
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 131, size=n).tolist() for n in (5, 30, 17, 41)]

POLICIES = {
    "ring": swaa.AttentionPolicy(window=8),
    "ring, sinks": swaa.AttentionPolicy(window=8, num_sink_tokens=3),
    "FA decode": swaa.AttentionPolicy(window=8, num_sink_tokens=3, decode="full"),
    "interleaved": swaa.AttentionPolicy(window=8, full_attention_layers="1::2", decode="full"),
    "tail": swaa.AttentionPolicy(window=8, full_attention_tail=4),
}


QUICK = ("qwen3", "qwen3_moe", "gemma3_text")  # together they have every kind of layer
ALL = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in tiny_hf.FAMILIES]


@pytest.fixture(scope="module", params=ALL)
def pair(request, tmp_path_factory):
    """A random Transformers model, and ours loaded from what it wrote."""
    directory = tmp_path_factory.mktemp(request.param)
    oracle = tiny_hf.build(request.param)
    tiny_hf.save(oracle, directory)
    return oracle, swaa.load_model(directory, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3-policies")
    tiny_hf.save(tiny_hf.build("qwen3", seed=1), directory)
    return swaa.load_model(directory, dtype="float32")


def transformers_answer(oracle, prompt, **kwargs):
    with torch.no_grad():
        out = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs
        )
    return out[0, len(prompt) :].tolist()


def test_greedy_is_transformers_token_for_token(pair):
    oracle, model = pair
    want = [transformers_answer(oracle, prompt) for prompt in PROMPTS]
    out = generate(model, None, PROMPTS, max_new_tokens=NEW)
    assert [list(tokens) for tokens in out.tokens] == want
    assert len({tuple(tokens) for tokens in want}) == len(want)


def test_greedy_over_many_chunks_is_transformers(pair):
    """Full attention and its own windows: prompts of several chunks, two slots for three."""
    oracle, model = pair
    prompts = [RNG.integers(3, 131, size=n).tolist() for n in (150, 33, 96)]
    engine = Engine(model, EngineOptions(num_slots=2, max_tokens=192, chunk_size=32, page_size=16))
    numbers = [engine.submit(Request(tokens=one, max_new_tokens=NEW)) for one in prompts]
    answers = {number: [] for number in numbers}
    for update in engine.run():
        answers[update.request] += update.tokens
    assert engine.clock.chunks == 5 + 2 + 3
    wanted = [transformers_answer(oracle, one, eos_token_id=None) for one in prompts]
    assert [answers[number] for number in numbers] == wanted


@pytest.mark.parametrize("pair", ["qwen3", "llama"], indirect=True)
def test_eos_ends_both_at_the_same_token(pair):
    oracle, model = pair
    (answer,) = generate(model, None, [PROMPTS[1]], max_new_tokens=NEW).tokens
    eos = answer[9]
    want = transformers_answer(oracle, PROMPTS[1], eos_token_id=eos)
    out = generate(model, None, [PROMPTS[1]], max_new_tokens=NEW, stop_token_ids=[eos])
    assert list(out.tokens[0]) == want
    assert len(want) <= 10


@nnx.jit
def uncached(model, tokens, lengths, stages):
    return model(tokens, lengths=lengths, stage_ids=stages)


def recomputed(model, prompts, answers):
    """What follows each answer token, from one uncached pass with explicit stages."""
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, lengths = pad_right(rows, num_rows=len(rows), width=max(map(len, rows)), pad_id=0)
    starts = np.array([len(prompt) for prompt in prompts])
    stages = np.where(np.arange(tokens.shape[1]) < starts[:, None], Stage.PROMPT, Stage.ANSWER)
    logits = uncached(model, *map(jnp.asarray, (tokens, lengths, stages.astype(np.int32))))
    following = np.asarray(logits).argmax(-1)
    return tuple(
        tuple(following[row, start - 1 : length].tolist())
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )


@pytest.fixture(scope="module")
def answered(model):
    """The answers under a policy of the table, or "full"; each is asked for once."""
    return functools.cache(
        lambda name: (
            generate(
                model.with_policy(POLICIES.get(name, name)),
                None,
                PROMPTS,
                max_new_tokens=NEW,
                ignore_eos=True,
            ).tokens
        )
    )


@pytest.mark.parametrize("name", POLICIES)
def test_stages_and_caches_under_every_policy(model, answered, name):
    found = answered(name)
    assert found == recomputed(model.with_policy(POLICIES[name]), PROMPTS, found)


def test_the_policy_shows(answered):
    assert len({answered(name) for name in ("full", *POLICIES)}) == len(POLICIES) + 1


def test_caches_are_as_small_as_decoding_allows(model):
    base = {"window": 8, "num_sink_tokens": 3}
    sizes = {}
    for decode in ("full", "window", (1,)):
        under = model.with_policy(swaa.AttentionPolicy(**base, decode=decode))
        out = generate(under, None, PROMPTS, max_new_tokens=NEW)
        sizes[decode] = out.timings.cache_bytes
    assert sizes["window"] < sizes[(1,)] < sizes["full"]


def test_windowed_caches_do_not_grow_with_the_prompt(model):
    under = model.with_policy(POLICIES["ring, sinks"])
    short, long = (
        generate(under, None, [[5] * n], max_new_tokens=2).timings.cache_bytes for n in (20, 200)
    )
    assert short == long


def test_a_real_model_compiles_once_a_bucket(model):
    under = model.with_policy(swaa.AttentionPolicy(window=6, decode="full"))
    before = compile_counts()
    for n in (5, 9, 30):
        generate(under, None, [[7] * n], max_new_tokens=20)
    generate(model.with_policy(under.policy), None, [[8] * 12], max_new_tokens=20)
    after = compile_counts()
    assert {name: after[name] - before.get(name, 0) for name in ("read", "decode")} == {
        "read": 1,
        "decode": 1,
    }


@pytest.mark.slow
def test_a_sharded_model_answers_alike(model):
    """Eight fake devices: parameters split, batches that the mesh divides and that it does not."""
    mesh = swaa_sharding.make_mesh(fsdp=4, tensor=2)
    policy = swaa.AttentionPolicy(window=8, num_sink_tokens=3, full_attention_layers=(1,))
    sharded = swaa.load_model(model.source, policy=policy, dtype="float32", mesh=mesh)
    for prompts in (PROMPTS, PROMPTS[:1]):
        want = generate(model.with_policy(policy), None, prompts, max_new_tokens=8)
        got = generate(sharded, None, prompts, max_new_tokens=8)
        assert got.tokens == want.tokens


def test_half_precision_runs(tmp_path):
    tiny_hf.save(tiny_hf.build("llama"), tmp_path, dtype="bfloat16")
    model = swaa.load_model(tmp_path, policy=POLICIES["interleaved"])
    out = generate(model, None, PROMPTS, max_new_tokens=6, temperature=0.7, top_k=5)
    assert [len(tokens) for tokens in out.tokens] == [6] * 4
