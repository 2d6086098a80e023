"""Costs in closed form against counting: every pair of every row, and every array of a cache."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax.costs import (
    FlopCounter,
    ModelFlops,
    Runs,
    active_parameters,
    cache_bytes,
    prefill_attention_share,
    visible_pairs,
)
from swaa_jax.policy import LayerAttention
from tests.support import bruteforce
from tests.support.random_models import random_model
from tests.support.training import lora_model, random_batch

WIDTH, NUM_KV_HEADS = 18, 4
LAYERS = st.builds(
    LayerAttention,
    window=st.one_of(st.none(), st.integers(1, 20)),
    num_sink_tokens=st.integers(0, 6),
    full_decode=st.booleans(),
    full_attention_tail=st.integers(0, 8),
    full_heads=st.sampled_from([(), (1,), (0, 3)]),
)


@st.composite
def packed_rows(draw):
    """Stages and segments of a row of texts, each of runs of PROMPT and ANSWER in turn."""
    segments, stages = np.full((1, WIDTH), -1), np.zeros((1, WIDTH), int)
    end = 0
    for number in range(draw(st.integers(0, 3))):
        stage = draw(st.integers(0, 1))
        for _ in range(draw(st.integers(1, 4))):
            start, end = end, min(WIDTH, end + draw(st.integers(1, 7)))
            segments[0, start:end], stages[0, start:end] = 7 - number, stage
            stage = 1 - stage
    return segments, stages


def counted(layer, segments, stages):
    """Pairs of a layer's mean head, by a loop over all of them."""
    shape = (*segments.shape, segments.shape[1])
    seen = bruteforce.visible_pairs(
        shape=shape,
        window=layer.window,
        sinks=layer.num_sink_tokens,
        q_full=bruteforce.full_rows(
            stages,
            segment_ids=segments,
            tail=layer.full_attention_tail,
            full_decode=layer.full_decode,
        ),
        segment_ids=segments,
    )
    full = bruteforce.visible_pairs(shape=shape, window=None, segment_ids=segments)
    heads = [full if head in layer.full_heads else seen for head in range(NUM_KV_HEADS)]
    return np.mean([of_head.sum(-1)[segments >= 0].sum() for of_head in heads])


@given(layers=st.lists(LAYERS, min_size=1, max_size=3), row=packed_rows())
def test_pairs_of_packed_rows_are_those_of_the_mask(layers, row):
    segments, stages = row
    runs = Runs.of_batch(segments, stages)
    want = sum(counted(layer, segments, stages) for layer in layers)
    assert visible_pairs(layers, runs, num_kv_heads=NUM_KV_HEADS) == pytest.approx(want, rel=1e-12)
    assert runs.num_tokens == np.sum(segments >= 0)


@given(layer=LAYERS, prompt=st.integers(1, 12), answer=st.integers(0, 6))
def test_a_prompt_and_its_answer_are_a_packed_row(layer, prompt, answer):
    stages = np.array([[0] * prompt + [1] * answer])
    want = counted(layer, np.zeros_like(stages), stages)
    runs = Runs.of_text(prompt, answer)
    assert visible_pairs([layer], runs, num_kv_heads=NUM_KV_HEADS) == pytest.approx(want, rel=1e-12)
    share = prefill_attention_share([layer], prompt, num_kv_heads=NUM_KV_HEADS)
    want = counted(layer, np.zeros((1, prompt), int), np.zeros((1, prompt), int))
    assert share == pytest.approx(want / (prompt * (prompt + 1) / 2), rel=1e-12)


def test_rows_of_a_batch_do_not_run_into_one_another():
    segments = np.zeros((3, 4), int)  # the same number in each
    runs = Runs.of_batch(segments, np.zeros((3, 4), int))
    assert runs.start.tolist() == [0, 0, 0] and runs.stop.tolist() == [4, 4, 4]


def test_a_million_tokens_are_counted_exactly():
    n, window, sinks = 1_000_000, 4096, 10
    layers = [LayerAttention(window=window, num_sink_tokens=sinks)] * 47 + [LayerAttention()]
    reach = window + sinks
    windowed = sum(range(1, reach + 1)) + (n - reach) * reach
    want = 47 * windowed + n * (n + 1) // 2
    assert visible_pairs(layers, Runs.of_text(n)) == want


def test_full_heads_need_their_number():
    layers = [LayerAttention(window=3, full_heads=(0,))]
    with pytest.raises(ValueError, match=r"num_kv_heads: expected .* got None"):
        prefill_attention_share(layers, 5)


def test_rings_have_no_more_slots_than_there_are_tokens():
    size = {"num_kv_heads": 2, "head_dim": 16, "itemsize": 4}
    ring = [LayerAttention(window=100, num_sink_tokens=3)]
    head = 2 * 16 * 4
    assert cache_bytes(ring, tokens=1000, **size) == 103 * (2 * head + 4)
    assert cache_bytes(ring, tokens=50, **size) == 50 * (2 * head + 4)
    split = [LayerAttention(window=9, full_heads=(1,))]
    assert cache_bytes(split, tokens=50, **size) == 50 * head + 9 * (head + 4)
    decoding = [LayerAttention(window=9, full_heads=(1,), full_decode=True), LayerAttention()]
    assert cache_bytes(decoding, tokens=50, **size) == 2 * 50 * 2 * head


def test_a_step_is_its_passes():
    model = lora_model(swaa.AttentionPolicy(window=4, num_sink_tokens=1, decode="full"))
    batch = random_batch(0)
    rows = types.SimpleNamespace(**batch)
    pairs = sum(
        counted(layer, batch["segment_ids"][row : row + 1], batch["stage_ids"][row : row + 1])
        for layer in model.layer_attention
        for row in range(8)
    )
    full = sum(
        counted(LayerAttention(), batch["segment_ids"][row : row + 1], np.zeros((1, 24), int))
        for row in range(8)
    )
    tokens, targets = batch["lengths"].sum(), np.count_nonzero(batch["loss_weights"])
    weights = active_parameters(model) * tokens + 32 * 61 * targets
    width = 4 * 16
    for trains_all, factor in ((False, 4), (True, 6)):
        flops = FlopCounter(model, trains_all=trains_all, with_teacher=False)
        assert flops(rows) == pytest.approx(factor * weights + 12 * width * pairs)
    flops = FlopCounter(model, trains_all=False, with_teacher=True)
    assert flops(rows) == pytest.approx(6 * weights + width * (12 * pairs + 4 * 2 * full))
    forward = ModelFlops.of(model).forward(model.layer_attention, Runs.of_text(7), num_logits=1)
    seen = 2 * counted(model.layer_attention[0], np.zeros((1, 7), int), np.zeros((1, 7), int))
    assert forward == pytest.approx(2 * (7 * active_parameters(model) + 32 * 61) + 4 * width * seen)


def test_a_token_is_multiplied_with_the_experts_that_it_goes_to():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = random_model(model_type="qwen3_moe", norm_topk_prob=True, **experts)
    attention = 2 * 32 * 64 + 2 * 32 * 32
    assert active_parameters(model) == 4 * (attention + 32 * 4 + 2 * 3 * 32 * 24)


def test_counts_beyond_the_integers():
    """5e9 tokens have more pairs than int64 has numbers."""
    n, window = 5 * 10**9, 1000
    assert prefill_attention_share([LayerAttention()], n) == pytest.approx(1.0)
    want = (window * (window + 1) // 2 + (n - window) * window) / (n * (n + 1) // 2)
    layers = [LayerAttention(window=window)]
    assert prefill_attention_share(layers, n) == pytest.approx(want, rel=1e-12)


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="layers and length: expected at least one of each"):
        prefill_attention_share([], 5)
    with pytest.raises(ValueError, match="layers and length"):
        prefill_attention_share([LayerAttention()], 0)
    with pytest.raises(ValueError, match="tokens: expected a number of at least 0, got -5"):
        cache_bytes([LayerAttention()], tokens=-5, num_kv_heads=1, head_dim=8)
