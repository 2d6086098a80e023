"""Fault 17: a ring has no more slots than a row can get tokens, whatever its window, in every way
that a prompt is read; and fault 18: work under a policy is counted in closed form.
"""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.attention import recast_caches
from swaa_jax.costs import prefill_attention_share
from tests.support.random_models import random_model

FULL = swaa.AttentionPolicy()
WIDE = [
    swaa.AttentionPolicy(window=2**20, num_sink_tokens=2**20),
    swaa.AttentionPolicy(window=2**20, full_attention_layers=[0]),
    swaa.AttentionPolicy(window=2**20, full_attention_heads={0: [1], 1: [0]}),
]


@pytest.fixture(scope="module")
def answered():
    """A model under full attention, and what it answers."""
    model = random_model(FULL)
    return model, swaa.generate(model, None, [[5, 6, 7]], max_new_tokens=4)


@pytest.mark.parametrize(
    "policy", [WIDE[0], pytest.param(WIDE[1], marks=pytest.mark.slow), WIDE[2]], ids=str
)
def test_fault_17_no_cache_is_larger_than_full_attentions(answered, policy):
    model, full = answered
    wide = swaa.generate(model.with_policy(policy), None, [[5, 6, 7]], max_new_tokens=4)
    assert wide.tokens == full.tokens  # nothing is outside the window
    slots = 4 * 128 * model.config.num_layers * 2  # a ring's own positions: 4 bytes a slot
    assert wide.timings.cache_bytes <= full.timings.cache_bytes + slots


@pytest.mark.parametrize("policy", WIDE, ids=str)
def test_fault_17_recast_rings_are_capped_too(policy):
    model = random_model(dataclasses.replace(policy, decode="full"))
    tokens = jnp.array([[5, 6, 7]])
    prefilled = model.prefill(tokens, cache_size=8)
    under = model.with_policy(policy)
    caches = recast_caches(prefilled.caches, under.layer_attention, cache_size=8)
    assert all(cache.num_slots <= 8 for cache in caches.layers)
    logits, _ = under.decode(jnp.array([[9]]), caches)
    expected = under(jnp.array([[5, 6, 7, 9]]), logits_at="last")
    np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=1e-4)


def test_fault_18_five_hundred_lengths_are_counted_in_a_moment():
    layers = swaa.AttentionPolicy(window=2048, num_sink_tokens=10, decode="full").resolve(36)
    started = time.monotonic()
    for length in range(24_000, 24_500):
        prefill_attention_share(layers, length, num_kv_heads=8)
    assert time.monotonic() - started < 10.0  # counted token by token: some minutes
