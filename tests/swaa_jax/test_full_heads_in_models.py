"""Policies with full heads in whole models: decoding, meshes, training, files, costs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.attention import FullCache, RingCache, SplitCache
from swaa_jax.costs import FlopCounter, cache_bytes, prefill_attention_share
from swaa_jax.eval.run.answering import resolve_all
from swaa_jax.models import CausalLM
from swaa_jax.train import OptimizerConfig, StepConfig, make_step
from tests.support.random_models import HF_CONFIG, random_model
from tests.support.training import lora_model, random_batch

SHAPE = dict(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_heads={0: [1], 1: [0, 3]})
LENGTHS = np.array([9, 14, 1])  # a ragged batch; 14 is also the padded width
NEW = 12  # longer than the window
WIDTH = int(LENGTHS.max()) + NEW


def tokens(seed, *shape):
    values = np.random.default_rng(seed).integers(0, HF_CONFIG["vocab_size"], shape)
    return values.astype(np.int32)


PROMPTS, ANSWERS = tokens(0, 3, 14), tokens(1, 3, NEW)


@functools.cache
def model_for(policy: swaa.AttentionPolicy, mesh=None) -> CausalLM:
    return random_model(policy, mesh=mesh, **SHAPE)


def uncached(model) -> np.ndarray:
    """Logits after the last prompt token and after each answer token, `[B, NEW + 1, V]`."""
    rows, stages = np.zeros((3, WIDTH), np.int32), np.zeros((3, WIDTH), np.int32)
    for row, length in enumerate(LENGTHS):
        rows[row, :length] = PROMPTS[row, :length]
        rows[row, length : length + NEW] = ANSWERS[row]
        stages[row, length : length + NEW] = 1
    at = LENGTHS[:, None] - 1 + np.arange(NEW + 1)[None, :]
    run = nnx.jit(
        lambda model: model(
            jnp.asarray(rows),
            lengths=jnp.asarray(LENGTHS + NEW),
            stage_ids=jnp.asarray(stages),
            logits_at=jnp.asarray(at),
        )
    )
    return np.asarray(run(model))


def cached(model) -> np.ndarray:
    """The same through the caches: a block longer than the window, then single tokens."""
    prefill = nnx.jit(
        lambda model: model.prefill(
            jnp.asarray(PROMPTS), lengths=jnp.asarray(LENGTHS), cache_size=WIDTH
        )
    )
    decode = nnx.jit(lambda model, new, caches: model.decode(new, caches))
    pre = prefill(model)
    logits, caches = [pre.logits[:, None]], pre.caches
    for start, stop in ((0, NEW - 2), (NEW - 2, NEW - 1), (NEW - 1, NEW)):
        more, caches = decode(model, jnp.asarray(ANSWERS[:, start:stop]), caches)
        logits.append(more)
    return np.concatenate([np.asarray(part) for part in logits], axis=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"decode": "full", "full_attention_tail": 3}, marks=pytest.mark.slow),
        {"full_attention_layers": [0], "full_attention_heads": {-1: [2]}, "decode": [1]},
    ],
    ids=str,
)
def test_decoding_through_split_caches_equals_one_pass(changes):
    model = model_for(dataclasses.replace(POLICY, **changes))
    got, expected = cached(model), uncached(model)
    # float32; the two sum the same terms in another order.
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected).max() > 1.0


def test_which_heads_are_full_matters():
    heads = ({}, {0: [1]}, {0: [2]}, {0: [0, 1, 2, 3]})
    results = []
    for each in heads:
        policy = dataclasses.replace(POLICY, full_attention_heads=each)
        results.append(np.asarray(model_for(policy)(jnp.asarray(PROMPTS))))
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert np.abs(one - other).max() > 1e-2


def test_layers_of_full_heads_alone_are_full_layers():
    policy = dataclasses.replace(POLICY, full_attention_heads={1: range(4)})
    full = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers=[1])
    model = model_for(POLICY)
    assert (
        model.with_policy(policy).layer_attention
        == model.with_policy(full).layer_attention
        == random_model(policy, **SHAPE).layer_attention
    )
    with pytest.raises(ValueError, match="are the same for a model of 2 layers"):
        resolve_all(model, [policy, full])


def test_heads_that_the_model_does_not_have_are_refused(tmp_path):
    policy = dataclasses.replace(POLICY, full_attention_heads={1: [3, 4]})
    model = model_for(POLICY)
    swaa.save_model(model, tmp_path / "model")
    for make in (
        lambda: model.with_policy(policy),
        lambda: random_model(policy, **SHAPE),
        lambda: swaa.load_model(tmp_path / "model", policy=policy),
    ):
        with pytest.raises(ValueError, match=r"heads, layer 1: expected KV heads .* 0 to 3, got 4"):
            make()


def test_a_saved_model_keeps_its_full_heads(tmp_path, caplog):
    model = model_for(POLICY)
    swaa.save_model(model, tmp_path / "model")
    assert "full_attention_heads: it windows all heads of a layer or none" in caplog.text
    stored = json.loads((tmp_path / "model" / "attention_policy.json").read_text())
    assert stored["policy"]["full_attention_heads"] == {"0": [1], "1": [0, 3]}
    loaded = swaa.load_model(tmp_path / "model", dtype="float32")
    assert loaded.policy == POLICY
    assert loaded.layer_attention == model.layer_attention
    np.testing.assert_array_equal(loaded(jnp.asarray(PROMPTS)), model(jnp.asarray(PROMPTS)))


def test_no_family_of_transformers_can_express_it():
    with pytest.raises(NotImplementedError, match="full_attention_heads"):
        POLICY.to_hf_config(model_for(POLICY).config)


def test_only_full_heads_keep_all_keys():
    model = model_for(POLICY)
    caches = nnx.jit(lambda model: model.prefill(jnp.asarray(PROMPTS), cache_size=100).caches)(
        model
    )
    head = 2 * 3 * 8 * 4  # k and v, rows, head dim, bytes of float32
    ring = 5 + 2
    for cache, num_full in zip(caches.layers, (1, 2), strict=True):
        assert isinstance(cache, SplitCache)
        assert isinstance(cache.full, FullCache) and isinstance(cache.windowed, RingCache)
        assert cache.full.k.shape == (3, 100, num_full, 8)
        assert cache.windowed.k.shape == (3, ring, 4 - num_full, 8)
    positions = 2 * 3 * ring * 4  # layers, rows, slots, bytes of int32
    assert caches.nbytes == head * (3 * 100 + 5 * ring) + positions
    size = {"num_kv_heads": 4, "head_dim": 8, "itemsize": 4}
    row = cache_bytes(model.layer_attention, tokens=100, **size)
    assert caches.nbytes == 3 * row


def test_prefill_work_is_counted_by_heads():
    layers = POLICY.resolve(2, num_kv_heads=4)
    length, total = 23, 23 * 24 / 2
    windowed = sum(min(i + 1, 5 + 2) for i in range(length))
    want = (total + 3 * windowed + 2 * total + 2 * windowed) / (8 * total)
    assert prefill_attention_share(layers, length, num_kv_heads=4) == pytest.approx(want)


def test_operations_are_counted_by_heads():
    batch = random_batch(0)
    rows = type("Rows", (), batch)

    def flops(heads):
        policy = dataclasses.replace(POLICY, window=2, full_attention_heads=heads)
        model = model_for(policy)
        return FlopCounter(model, trains_all=True, with_teacher=False)(rows)

    none, one, every = flops({}), flops({0: [1]}), flops({0: range(4)})
    assert every > none
    assert one - none == pytest.approx((every - none) / 4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor": 8}, marks=pytest.mark.slow),  # twice the KV heads: no copies here
    ],
    ids=str,
)
def test_on_a_mesh_it_equals_one_device(sizes):
    """Parts of one, two and three heads: `tensor` divides some, and others are whole."""
    mesh = sharding.make_mesh(jax.devices()[: np.prod(list(sizes.values()))], **sizes)
    one, many = model_for(POLICY), model_for(POLICY, mesh)
    rows, new = jnp.asarray(tokens(2, 4, 16)), jnp.asarray(tokens(3, 4, 6))
    lengths = jnp.array([16, 3, 9, 12])

    @nnx.jit
    def run(model):
        pre = model.prefill(rows, lengths=lengths, cache_size=24)
        return pre.logits, *model.decode(new, pre.caches)

    got, want = run(many), run(one)
    # float32; partial sums over devices are added in another order.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
        got,
        want,
    )
    full = got[2].layers[1].full.k
    assert len(full.sharding.device_set) == mesh.size
    shard = full.addressable_shards[0].data.shape
    by_rows, by_heads = sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("tensor", 1)
    assert shard[0] == 4 // by_rows and shard[2] == (1 if by_heads == 2 else 2)


def test_a_scanned_step_equals_an_unrolled_one():
    """Three kinds of layers in one scan; `test_full_attention_heads` has the gradient itself."""
    policy = dataclasses.replace(POLICY, full_attention_heads={0: [1], 2: [0]}, decode="full")
    batch = random_batch(0, num_rows=2)
    results = []
    for scan_layers in (False, True):
        model = lora_model(policy, num_hidden_layers=3, backend="reference")
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, total_steps=2)
        config = StepConfig(optimizer=optimizer, dtype="float32", scan_layers=scan_layers)
        trainer = make_step(model, config)
        state, metrics = trainer(trainer.init(), batch)
        results.append(jax.tree.map(np.asarray, (state.trainable, metrics)))
    # float32; a scan's body is fused otherwise.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)
