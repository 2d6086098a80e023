"""Prefill and decode through the caches equal one uncached pass over prompt and answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.attention import FullCache, RingCache, recast_caches
from tests.support.random_models import HF_CONFIG, random_model

PROMPT, ANSWER = int(swaa.Stage.PROMPT), int(swaa.Stage.ANSWER)
LENGTHS = np.array([9, 14, 1])  # a ragged batch; 14 is also the padded width
NEW = 20  # longer than the short windows
WIDTH = int(LENGTHS.max()) + NEW


def policy(window, sinks, layers=(), decode="window", tail=0) -> swaa.AttentionPolicy:
    return swaa.AttentionPolicy(
        window=window,
        num_sink_tokens=sinks,
        full_attention_layers=layers,
        decode=decode,
        full_attention_tail=tail,
    )


POLICIES = [swaa.AttentionPolicy()]
# Windows shorter than, equal to and longer than the longest prompt. All pairs of settings are among
# the quick ones, all triples among the slow ones.
SLOW = []
MODES = ({}, {"decode": "full"}, {"layers": "1::2", "decode": "full", "tail": 3})
for i, window in enumerate((5, 14, 50)):
    for j, sinks in enumerate((0, 1, 10)):
        for k, mode in enumerate(MODES):
            (POLICIES if (i + j + k) % 3 == 0 else SLOW).append(policy(window, sinks, **mode))
POLICIES += [
    policy(1, 0),
    policy(1, 1, decode="full"),
    policy(5, 2, layers="1::2", tail=2),
    policy(5, 2, layers=(0,), decode=(2,)),
    policy(5, 0, layers=(0, 2), decode="full"),
]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[B, 14]`, right padding filled with an arbitrary token, and answers `[B, NEW]`."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, HF_CONFIG["vocab_size"], (len(LENGTHS), LENGTHS.max())),
        rng.integers(0, HF_CONFIG["vocab_size"], (len(LENGTHS), NEW)),
    )


@functools.cache
def model_for(policy: swaa.AttentionPolicy):
    return random_model(policy, num_hidden_layers=3)


def uncached(model) -> np.ndarray:
    """Logits after the last prompt token and after each answer token, `[B, NEW + 1, V]`."""
    prompts, answers = batch()
    width = WIDTH
    tokens, stages = np.zeros((3, width), np.int32), np.full((3, width), PROMPT, np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = prompts[row, :length]
        tokens[row, length : length + NEW] = answers[row]
        stages[row, length : length + NEW] = ANSWER
    at = LENGTHS[:, None] - 1 + np.arange(NEW + 1)[None, :]
    run = jax.jit(model.__call__)  # eager calls compile op by op, which takes longer
    return np.asarray(
        run(
            jnp.asarray(tokens),
            lengths=jnp.asarray(LENGTHS + NEW),
            stage_ids=jnp.asarray(stages),
            logits_at=jnp.asarray(at),
        )
    )


def cached(model, blocks: list[int]) -> np.ndarray:
    prompts, answers = map(jnp.asarray, batch())
    prefill = jax.jit(functools.partial(model.prefill, cache_size=WIDTH))
    decode = jax.jit(model.decode)
    pre = prefill(prompts, lengths=jnp.asarray(LENGTHS))
    logits, caches, start = [pre.logits[:, None]], pre.caches, 0
    for size in blocks:
        more, caches = decode(answers[:, start : start + size], caches)
        logits.append(more)
        start += size
    np.testing.assert_array_equal(caches.pos_B, LENGTHS + start)
    return np.concatenate([np.asarray(part) for part in logits], axis=1)


@pytest.mark.parametrize(
    "policy", [*POLICIES, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str
)
def test_decoding_in_blocks_equals_one_pass(policy):
    # Single tokens, and blocks longer than the short windows and rings.
    model = model_for(policy)
    got, expected = cached(model, [1, 9, 9, 1]), uncached(model)
    # float32; the two sum the same terms in another order.
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected).max() > 1.0


def test_every_part_of_the_policy_matters():
    """The comparison above would notice a part that both sides ignore."""
    policies = [
        swaa.AttentionPolicy(),
        policy(5, 0),
        policy(5, 2),
        policy(5, 0, decode="full"),
        policy(5, 0, layers="1::2"),
        policy(5, 0, tail=2),
    ]
    results = [uncached(model_for(each)) for each in policies]
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert np.abs(one - other).max() > 1e-2


def test_layers_keep_the_cache_that_their_policy_needs():
    policy = swaa.AttentionPolicy(window=5, num_sink_tokens=3, full_attention_layers=(1,))
    prompts, _ = batch()
    caches = random_model(policy).prefill(jnp.asarray(prompts), cache_size=100).caches
    kinds = [type(cache) for cache in caches.layers]
    assert kinds == [RingCache, FullCache, RingCache, RingCache]
    assert [cache.num_slots for cache in caches.layers] == [8, 100, 8, 8]
    per_slot = 2 * 2 * 16 * 4 * 3  # k and v, heads, head dim, bytes of float32, rows
    positions = 3 * 8 * 4 * 3  # three rings, slots, bytes of int32, rows
    assert caches.nbytes == per_slot * (100 + 3 * 8) + positions
    long = random_model(dataclasses.replace(policy, window=500))
    for size, slots in ((20, [20] * 4), (None, [503, 14 + 128, 503, 503])):
        caches = long.prefill(jnp.asarray(prompts), cache_size=size).caches
        assert [cache.num_slots for cache in caches.layers] == slots


def test_a_full_decode_policy_shares_its_prefill_with_its_windowed_twin():
    windowed = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers=(1,))
    full_decode = dataclasses.replace(windowed, decode="full")
    model = random_model()
    prompts, answers = batch()
    size = WIDTH
    arguments = dict(lengths=jnp.asarray(LENGTHS), cache_size=size)
    shared = model.with_policy(full_decode).prefill(jnp.asarray(prompts), **arguments)
    own = model.with_policy(windowed).prefill(jnp.asarray(prompts), **arguments)
    layers = windowed.resolve(4)
    recast = recast_caches(shared.caches, layers)
    jax.tree.map(np.testing.assert_array_equal, recast, own.caches)
    twin = model.with_policy(windowed)
    logits, _ = twin.decode(jnp.asarray(answers), recast)
    np.testing.assert_array_equal(logits, twin.decode(jnp.asarray(answers), own.caches)[0])
    with pytest.raises(ValueError, match="ring cache cannot"):
        recast_caches(own.caches, full_decode.resolve(4))


def test_wrong_caches_are_refused():
    prompts, answers = batch()
    windowed = random_model(swaa.AttentionPolicy(window=5))
    caches = windowed.prefill(jnp.asarray(prompts)).caches
    with pytest.raises(ValueError, match="FullCache"):
        random_model().decode(jnp.asarray(answers), caches)
    with pytest.raises(ValueError, match="cache_size"):
        random_model().prefill(jnp.asarray(prompts), cache_size=3)
    with pytest.raises(ValueError, match="expected 2 layers"):
        random_model(num_hidden_layers=2).decode(jnp.asarray(answers), caches)


def test_a_tail_takes_no_stages_in_decode():
    """Whether a prompt's tail has come is not known before its end."""
    model = random_model(policy(5, 2, layers=(0,), decode="full", tail=2))
    prompts, answers = batch()
    caches = model.prefill(jnp.asarray(prompts)).caches
    for stage in (PROMPT, ANSWER):
        stages = jnp.full((3, NEW), stage)
        with pytest.raises(ValueError, match=r"prompt_lengths: expected .*tail=2, got None"):
            model.decode(jnp.asarray(answers), caches, stage_ids=stages)


def test_prompt_stages_in_decode_are_windowed():
    """A chunk of prompt read through the caches sees what it would see in one prefill."""
    policy = swaa.AttentionPolicy(window=4, num_sink_tokens=2, decode="full")
    model = random_model(policy)
    prompts, _ = batch()
    whole = model.prefill(jnp.asarray(prompts), cache_size=14)
    part = model.prefill(jnp.asarray(prompts[:, :6]), cache_size=14)
    stages = jnp.full((3, 8), PROMPT)
    logits, caches = model.decode(jnp.asarray(prompts[:, 6:]), part.caches, stage_ids=stages)
    np.testing.assert_allclose(logits[:, -1], whole.logits, rtol=2e-4, atol=2e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), caches, whole.caches
    )
