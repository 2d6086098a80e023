"""The lazy ratio against attention weights that Transformers writes out."""

import sys

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.data import Sample
from swaa_jax.selection import LazyRatioConfig, lazy_ratios
from swaa_jax.selection.lazy_ratio import lazy_ratio
from tests.support.random_models import random_model

module = sys.modules["swaa_jax.selection.lazy_ratio"]
CONFIG = LazyRatioConfig(num_sink_keys=3, num_recent_keys=9, num_last_queries=5)


def sample(prompt, answer, *, vocab=131, seed=0):
    tokens = np.random.default_rng(seed).integers(3, vocab, prompt + answer).astype(np.int32)
    is_answer = np.arange(prompt + answer) >= prompt
    return Sample(tokens=tokens, stage_ids=is_answer.astype(np.int32), is_target=is_answer)


def mass_by_hand(weights_NTT, *, sinks, recent, last):
    """The mean weight of the last queries on the first and the last keys, query by query."""
    num_heads, count, _ = weights_NTT.shape
    found = []
    for head in range(num_heads):
        for query in range(max(0, count - last), count):
            keys = [key for key in range(query + 1) if key < sinks or key >= count - recent]
            found.append(sum(float(weights_NTT[head, query, key]) for key in keys))
    return np.mean(found)


# Gemma's scores are capped; its window is wider than the texts.
@pytest.mark.parametrize(
    ("family", "overrides"), [("qwen3", {}), ("llama", {}), ("gemma2", {"sliding_window": 400})]
)
def test_ratios_are_sums_of_attention_weights(family, overrides, tmp_path):
    tiny_hf = pytest.importorskip("tests.support.tiny_hf", reason="torch is the oracle")
    torch = tiny_hf.torch
    theirs = tiny_hf.build(family, **overrides)
    tiny_hf.save(theirs, tmp_path)
    # Its own policy, here a window, does not matter. Not on a bucket's edge, and on it.
    model = swaa.load_model(tmp_path, policy=swaa.AttentionPolicy(window=4), dtype="float32")
    samples = [sample(61, 4), sample(64, 2, seed=1), sample(20, 3, seed=2)]
    found = lazy_ratios(model, samples, config=CONFIG)
    for one, row in zip(samples, found, strict=True):
        prompt = one.tokens[one.stage_ids == 0]
        with torch.no_grad():
            weights = theirs(torch.tensor(prompt[None]), output_attentions=True).attentions
        recent = min(9, len(prompt) // 4)  # of the 20 tokens: 5
        expected = [
            mass_by_hand(layer[0].numpy(), sinks=3, recent=recent, last=5) for layer in weights
        ]
        # Weights below one in float32; the layers before add their own rounding.
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
    assert np.ptp(found) > 0.05


def test_the_ratio_never_outweighs_a_vote(monkeypatch):
    # Layer 0 is lazy once more than layer 1 is, but by so little that its mean is far smaller.
    ratios = np.array([[0.01, 0.0]] * 201 + [[0.0, 1.0]] * 200)
    monkeypatch.setattr(module, "lazy_ratios", lambda *_, **__: ratios)
    found = lazy_ratio(random_model(), [], 1)
    assert found.details["lazy_votes"] == [201, 200]
    assert found.chosen == (1,)
    # Of equal votes the smaller ratio decides.
    monkeypatch.setattr(module, "lazy_ratios", lambda *_, **__: ratios[1:])
    assert lazy_ratio(random_model(), [], 1).chosen == (0,)


def test_a_text_shorter_than_all_that_is_asked_for_counts_every_query():
    model = random_model()
    config = LazyRatioConfig(num_sink_keys=100, num_last_queries=50)
    found = lazy_ratios(model, [sample(7, 2, vocab=61)], config=config)
    # All keys are sink keys: all mass, up to a rounding.
    np.testing.assert_allclose(found, 1, rtol=0, atol=1e-6)
    config = LazyRatioConfig(num_sink_keys=0, num_recent_keys=8, num_last_queries=50)
    (row,) = lazy_ratios(model, [sample(8, 2, vocab=61)], config=config)
    # Two recent keys of eight: the first six of the eight queries see none of them.
    assert (row < 2 / 8).all()
    assert (row > 0).all()
