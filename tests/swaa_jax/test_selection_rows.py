"""Many policies as rows of one program, against each policy's own run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.attention import AttentionOptions, GatedLayer, RowWindows, attend
from swaa_jax.data import Sample
from swaa_jax.policy import LayerAttention
from swaa_jax.selection import RowScorer
from swaa_jax.selection.calibration import check_samples, group_samples
from swaa_jax.selection.per_row import rows_within
from tests.support.random_models import random_model

CANDIDATES = [(), (1, 3), (2,), (0, 1, 2, 3)]
POLICIES = {
    "FA decode": swaa.AttentionPolicy(window=7, num_sink_tokens=2, decode="full"),
    "window decode": swaa.AttentionPolicy(window=7),
    "decode by layer, tail": swaa.AttentionPolicy(
        window=5, num_sink_tokens=1, decode=(0, 2), full_attention_tail=3
    ),
}


def sample(stages, *, seed=0):
    """Random tokens; the stages are written like ``"p20 a3 p5 a2"``; answers are targets."""
    ids = np.concatenate([np.full(int(part[1:]), part[0] == "a") for part in stages.split()])
    tokens = np.random.default_rng(seed).integers(0, 61, len(ids)).astype(np.int32)
    return Sample(tokens=tokens, stage_ids=ids.astype(np.int32), is_target=ids.astype(bool))


# Three of one bucket (64), one with two answers, and one of another (32).
SAMPLES = [
    sample("p52 a4", seed=1),
    sample("p30 a4 p20 a2", seed=2),
    sample("p55 a1", seed=3),
    sample("p20 a5", seed=4),
]


def nll_alone(model, one):
    """The mean NLL of a sample's targets from the logits of its own, unpadded row."""
    tokens, stages = jnp.asarray(one.tokens)[None], jnp.asarray(one.stage_ids)[None]
    logits = np.asarray(model(tokens, stage_ids=stages))[0].astype(np.float64)
    at = np.flatnonzero(one.is_target)
    return -log_softmax(logits[at - 1], axis=-1)[np.arange(len(at)), one.tokens[at]].mean()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "window decode")) for name in POLICIES],
)
def test_rows_equal_separate_runs_and_are_traced_once(name):
    model, policy = random_model(), POLICIES[name]
    scorer = RowScorer(model, SAMPLES, policy=policy, rows_at_once=4)
    found = scorer(CANDIDATES)
    assert scorer.num_compiles == 2  # one a bucket, for all candidates
    scorer([(3,), (0, 2)])
    assert scorer.num_compiles == 2
    for layers, row in zip(CANDIDATES, found, strict=True):
        own = model.with_policy(dataclasses.replace(policy, full_attention_layers=layers))
        expected = [nll_alone(own, one) for one in SAMPLES]
        # float32 logits around 10, whose sums come in another order.
        np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5)
    assert np.ptp(found, axis=0).min() > 1e-3  # candidates do differ


def test_a_policy_with_full_heads_is_scored_by_itself():
    policy = dataclasses.replace(POLICIES["FA decode"], full_attention_heads={1: (0,), 2: (1,)})
    model = random_model()
    scorer = RowScorer(model, SAMPLES, policy=POLICIES["FA decode"], rows_at_once=2)
    expected = [nll_alone(model.with_policy(policy), one) for one in SAMPLES]
    # As above.
    np.testing.assert_allclose(scorer.of_policy(policy), expected, rtol=0, atol=2e-5)


def test_rows_on_a_mesh_equal_those_on_one_device():
    policy = POLICIES["FA decode"]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    one, many = random_model(), random_model(mesh=mesh)
    expected = RowScorer(one, SAMPLES[:3], policy=policy, rows_at_once=4)(CANDIDATES)
    # Five rows do not divide by data x fsdp = 4: eight run.
    found = RowScorer(many, SAMPLES[:3], policy=policy, rows_at_once=5)(CANDIDATES)
    # float32 sums over two devices' parts.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_row_with_its_own_window_sees_what_a_static_one_sees(backend):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 24, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    windows, lengths = [3, 24, 1, 100], jnp.array([24, 20, 17, 24])
    stages = jnp.asarray(rng.integers(0, 2, (4, 24)), jnp.int32)
    about = {"lengths": lengths, "stage_ids": stages, "options": AttentionOptions(backend=backend)}
    fields = {"num_sink_tokens": 2, "full_decode": True}
    traced = jax.jit(
        lambda window: attend(q, k, v, layer=RowWindows(window=window, **fields), **about)
    )
    out = traced(jnp.array(windows, jnp.int32))
    for row, window in enumerate(windows):
        static = attend(q, k, v, layer=LayerAttention(window=window, **fields), **about)
        # The same products, summed over blocks that begin elsewhere.
        np.testing.assert_allclose(out[row], static[row], rtol=0, atol=1e-5)


def test_a_gate_mixes_full_and_windowed_attention_head_by_head():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    windowed = LayerAttention(window=3)
    full, local = (np.asarray(attend(q, k, v, layer=x)) for x in (LayerAttention(), windowed))
    out = attend(q, k, v, layer=GatedLayer(gate=jnp.array([0.25, 1.0]), windowed=windowed))
    expected = np.concatenate([0.25 * full[:, :, :2] + 0.75 * local[:, :, :2], full[:, :, 2:]], 2)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)  # a float32 rounding or two
    shared = attend(q, k, v, layer=GatedLayer(gate=jnp.array([0.5]), windowed=windowed))
    np.testing.assert_allclose(shared, (full + local) / 2, rtol=0, atol=1e-6)


def test_samples_are_grouped_by_bucket_and_their_weights_sum_to_one():
    small, large = group_samples(SAMPLES)
    assert (small.numbers, large.numbers) == ((3,), (0, 1, 2))
    assert (small.width, large.width) == (32, 64)
    np.testing.assert_allclose(large.weights.sum(axis=1), 1, rtol=1e-6)  # float32
    one = SAMPLES[1]
    targets = large.targets[1][large.weights[1] > 0]
    np.testing.assert_array_equal(targets, one.tokens[one.is_target])
    np.testing.assert_array_equal(one.tokens[large.at[1][:6] + 1], targets)
    rows = large.rows([1, -1])
    assert rows["lengths"].tolist() == [56, 1]


def test_rows_follow_the_memory_budget():
    config = random_model().config
    few, more = (rows_within(budget, config=config, width=1024) for budget in (10**7, 3 * 10**7))
    assert 1 <= few < more <= 64
    assert rows_within(1, config=config, width=1024) == 1


@pytest.mark.parametrize(
    ("samples", "policy", "message"),
    [
        ([], POLICIES["FA decode"], "at least one"),
        (SAMPLES, swaa.AttentionPolicy(), "full attention"),
        (SAMPLES, swaa.AttentionPolicy(window=7, full_attention_layers=(1,)), "no full layers"),
        (SAMPLES, swaa.AttentionPolicy(window=64), "smaller window"),
        ([sample("p20")], POLICIES["FA decode"], "sample 0"),
        ([sample("p300 a9")], POLICIES["FA decode"], "256"),
    ],
)
def test_samples_that_tell_nothing_are_refused(samples, policy, message):
    with pytest.raises(ValueError, match=message):
        check_samples(random_model(), samples, policy)


def test_answers_count_for_the_window_where_they_are_windowed():
    answers = [sample("p6 a20")]
    model = random_model()
    for decode in ("window", (0,)):
        check_samples(model, answers, swaa.AttentionPolicy(window=8, decode=decode))
    with pytest.raises(ValueError, match="longest prompt has tokens, 6"):
        check_samples(model, answers, swaa.AttentionPolicy(window=8, decode="full"))
    with pytest.raises(ValueError, match="longest sample has tokens, 26"):
        check_samples(model, answers, swaa.AttentionPolicy(window=26))


def test_tokens_of_another_vocabulary_are_refused():
    other = dataclasses.replace(SAMPLES[0], tokens=SAMPLES[0].tokens + 40)
    with pytest.raises(ValueError, match="0 to 60"):
        check_samples(random_model(), [SAMPLES[0], other], POLICIES["FA decode"])


def test_a_layer_that_the_model_does_not_have_is_refused():
    scorer = RowScorer(random_model(), SAMPLES, policy=POLICIES["FA decode"])
    with pytest.raises(ValueError, match="0 to 3"):
        scorer([(4,)])
