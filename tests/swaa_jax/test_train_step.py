"""The training step against itself: scanned, accumulated, sharded, packed, distilled."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.lora import LoraConfig, LoraParam, without_lora
from swaa_jax.train import LossConfig, OptimizerConfig, StepConfig, make_step
from swaa_jax.train.feed import make_feed
from tests.support.devices import mesh_of
from tests.support.training import (
    POLICY,
    examples,
    gradient,
    lora_model,
    packed,
    random_batch,
    to_host,
)

FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, total_steps=20)


def config(**changes):
    return StepConfig(**{"optimizer": FAST, "dtype": "float32", "scan_layers": False, **changes})


def train(model, step_config, batches):
    """Trained values and the metrics of every step, on the host; one program for all steps."""
    trainer = make_step(model, step_config)
    state, history = trainer.init(), []
    for batch in batches:
        state, metrics = trainer(state, batch)
        history.append(metrics)
    assert trainer.num_compiles() == 1
    return to_host(state.trainable), to_host(history)


def assert_close(got, want, *, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, want)


@pytest.fixture(scope="module")
def unrolled():
    """Three steps of four layers of two kinds, with dropout, in one micro-batch."""
    return train(deep_model(), config(remat="none"), [random_batch(i) for i in range(3)])


def deep_model(**overrides):
    lora = LoraConfig(rank=3, alpha=6.0, dropout=0.2)
    return lora_model(num_hidden_layers=4, lora=lora, backend="reference", **overrides)


@pytest.mark.parametrize("remat", ["layer", "dots", "offload"])
def test_scanned_layers_equal_unrolled_ones(unrolled, remat):
    step_config = config(scan_layers=True, remat=remat)
    got = train(deep_model(), step_config, [random_batch(i) for i in range(3)])
    assert_close(got, unrolled)


def test_dropout_differs_by_seed(unrolled):
    batches = [random_batch(i) for i in range(3)]
    other, _ = train(deep_model(), config(seed=1), batches)
    name = "layers.0.self_attn.q_proj.adapter.lora_B"
    assert np.max(np.abs(other[name] - unrolled[0][name])) > 1e-4


def test_accumulation_weighs_micro_batches_by_their_targets():
    batches = [random_batch(i) for i in range(2)]
    for batch in batches:
        batch["loss_weights"][:2] = 0.0  # a micro-batch without answers
        batch["loss_weights"][5] *= 3.0
    model = lora_model(backend="reference")
    whole = train(model, config(target_losses=True), batches)
    cut = train(model, config(target_losses=True, accumulate=4), batches)
    for (_, history), rows in ((whole, (1, 8)), (cut, (4, 2))):
        for metrics, batch in zip(history, batches, strict=True):
            nll, correct = metrics["target_nll"], metrics["target_correct"]
            weights = batch["loss_weights"].reshape(*rows, -1)
            assert nll.shape == correct.shape == weights.shape
            share = weights / weights.sum()
            np.testing.assert_allclose(np.sum(share * nll), metrics["loss"], rtol=1e-5)
            np.testing.assert_allclose(np.sum(share * correct), metrics["accuracy"], rtol=1e-5)
            for name in ("target_nll", "target_correct"):
                metrics[name] = metrics[name].reshape(batch["tokens"].shape)
    assert_close(cut, whole)
    given = [
        {name: value.reshape(4, 2, *value.shape[1:]) for name, value in batch.items()}
        for batch in batches
    ]
    again, history = train(model, config(accumulate=4), given)
    assert_close(again, cut[0], rtol=0, atol=0)
    np.testing.assert_array_equal([m["loss"] for m in history], [m["loss"] for m in cut[1]])


def five_steps(mesh=None, *, per_row, scan_layers):
    batches = [random_batch(i, per_row=per_row) for i in range(5)]
    for batch in batches if per_row == 1 else ():
        del batch["segment_ids"], batch["positions"]
    step_config = config(remat="layer", scan_layers=scan_layers)
    return train(lora_model(mesh=mesh), step_config, batches)


five_steps_of_one_device = functools.cache(five_steps)


def assert_five_steps_equal(sizes, **kind):
    many, many_history = five_steps(mesh_of(**sizes), **kind)
    one, one_history = five_steps_of_one_device(**kind)
    # float32; sums over devices are added in another order.
    assert_close(many, one, rtol=0, atol=1e-5)
    assert_close(many_history, one_history, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "per_row", [2, pytest.param(1, marks=pytest.mark.slow)], ids=["packed", "one a row"]
)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_five_sharded_steps_equal_those_of_one_device(sizes, per_row):
    assert_five_steps_equal(sizes, per_row=per_row, scan_layers=False)


@pytest.mark.slow
@pytest.mark.multigpu
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2}, {"data": 2}, {"fsdp": 4}, {"data": 2, "tensor": 2}], ids=str
)
def test_five_scanned_sharded_steps_equal_those_of_one_device(sizes):
    """Layers in a scan, each computed again for its gradient, of packed rows."""
    assert_five_steps_equal(sizes, per_row=2, scan_layers=True)


def test_rows_of_one_sample_need_no_segments():
    """What `Feed(one_a_row=True)` leaves out says nothing that lengths do not say."""
    batches = [random_batch(i, per_row=1) for i in range(2)]
    feed = make_feed(None, batch_size=8, rows_per_device=8, one_a_row=True)
    fed = [feed.put(types.SimpleNamespace(**batch)) for batch in batches]
    assert set(batches[0]) - set(fed[0]) == {"segment_ids", "positions"}
    model = lora_model(backend="reference")
    assert_close(train(model, config(), fed), train(model, config(), batches))


@pytest.mark.slow
def test_full_fine_tuning_on_a_mesh_equals_one_device():
    batches = [random_batch(i) for i in range(5)]
    step_config = config(trainable="all", scan_layers=True, accumulate=1)
    model = {"num_hidden_layers": 2, "tie_word_embeddings": True, "backend": "reference"}
    one, _ = train(without_lora(lora_model(**model)), step_config, batches)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    many, _ = train(without_lora(lora_model(**model, mesh=mesh)), step_config, batches)
    assert "embed_tokens.embedding" in one
    assert_close(many, one, rtol=0, atol=1e-5)


def test_a_packed_ragged_batch_equals_its_examples_trained_alone():
    made = examples(5, seed=3)
    rows = packed([made[:2], made[2:3], made[3:]], width=26)
    model = lora_model()
    trainer = make_step(model, config(remat="layer"))
    slopes, metrics = gradient(trainer, trainer.init(), rows)

    graphdef, adapters, frozen = nnx.split(model, LoraParam, ...)
    total, count, summed = 0.0, 0.0, None
    for example in made:

        def loss(adapters, example=example):
            logits = nnx.merge(graphdef, adapters, frozen)(
                jnp.asarray(example["tokens"])[None],
                stage_ids=jnp.asarray(example["stage_ids"])[None],
            )
            nll = -jnp.take_along_axis(
                jax.nn.log_softmax(logits[0]), jnp.asarray(example["targets"])[:, None], axis=1
            )
            return jnp.sum(nll[:, 0] * example["loss_weights"])

        value, slope = jax.jit(jax.value_and_grad(loss))(adapters)
        total, count = total + value, count + example["loss_weights"].sum()
        summed = slope if summed is None else jax.tree.map(jnp.add, summed, slope)
    np.testing.assert_allclose(metrics["loss"] * count, total, rtol=1e-5)
    assert metrics["num_answer_tokens"] == count
    assert metrics["num_tokens"] == sum(example["tokens"].size for example in made)
    for path, want in nnx.to_flat_state(summed):
        got = slopes[".".join(map(str, path))] * count
        np.testing.assert_allclose(got, want.get_value(), rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_self_distillation_pulls_to_the_full_attention_base():
    loss = LossConfig(sft=0.25, self_distill=0.75, temperature=2.0, chunk_tokens=16)
    model = lora_model(backend="reference")
    batch = random_batch(4)
    trainer = make_step(model, config(loss=loss))
    state = trainer.init()
    slopes, metrics = gradient(trainer, state, batch)

    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    inputs = {name: arrays[name] for name in ("stage_ids", "segment_ids", "lengths", "positions")}
    teacher = without_lora(model).with_policy(swaa.AttentionPolicy())(arrays["tokens"], **inputs)
    log_p = jax.nn.log_softmax(teacher / loss.temperature)
    graphdef, adapters, frozen = nnx.split(model, LoraParam, ...)

    def oracle(adapters):
        logits = nnx.merge(graphdef, adapters, frozen)(arrays["tokens"], **inputs)
        log_s = jax.nn.log_softmax(logits / loss.temperature)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_s), axis=-1) * loss.temperature**2
        nll = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), arrays["targets"][..., None], axis=-1
        )[..., 0]
        weights = arrays["loss_weights"] / jnp.sum(arrays["loss_weights"])
        parts = jnp.sum(weights * kl), jnp.sum(weights * nll)
        return loss.self_distill * parts[0] + loss.sft * parts[1], parts

    (want, (kl, nll)), want_slopes = jax.jit(jax.value_and_grad(oracle, has_aux=True))(adapters)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["self_distill_loss"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["sft_loss"], nll, rtol=1e-5)
    for path, want in nnx.to_flat_state(want_slopes):
        got = slopes[".".join(map(str, path))]
        np.testing.assert_allclose(got, want.get_value(), rtol=1e-4, atol=1e-6, err_msg=str(path))
    # Evaluation is the same loss, without a step.
    assert_close(trainer.evaluate(state, batch), dict(metrics))


def test_experts_are_kept_in_balance():
    model = lora_model(
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        router_aux_loss_coef=0.5,
        backend="reference",
    )
    batch = random_batch(5)
    batch["lengths"][-1] = 0  # a row that only fills up the batch
    batch["loss_weights"][-1] = 0.0
    trainer = make_step(model, config(scan_layers=True))
    _, metrics = trainer(trainer.init(), batch)
    inputs = {name: jnp.asarray(value) for name, value in batch.items()}
    for name in ("targets", "loss_weights"):
        del inputs[name]
    want = jax.jit(lambda: model.hidden_states(**inputs).router_loss)()
    np.testing.assert_allclose(metrics["router_loss"], want, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], metrics["sft_loss"] + 0.5 * metrics["router_loss"], rtol=1e-6
    )


def test_the_trained_model_has_the_trained_values_and_shares_the_rest():
    model = lora_model(dtype="bfloat16", backend="reference")
    trainer = make_step(model, StepConfig(optimizer=FAST, scan_layers=True))
    state = trainer.init()
    for step in range(2):  # the first one's rate is 0
        state, metrics = trainer(state, random_batch(step))
    assert metrics["learning_rate"] > 0
    trained = trainer.model(state)
    assert trained.policy == POLICY
    assert trained.layers[1].mlp.up_proj.kernel[...] is model.layers[1].mlp.up_proj.kernel[...]
    batch = trainer.put(random_batch(7))
    hidden = nnx.jit(lambda model, tokens: model(tokens, return_hidden=True))
    tokens = batch["tokens"][0]
    assert np.any(np.asarray(hidden(trained, tokens) != hidden(model, tokens)))
    name = "layers.1.self_attn.v_proj.adapter.lora_A"
    np.testing.assert_array_equal(
        trained.layers[1].self_attn.v_proj.adapter.lora_A[...], state.trainable[name]
    )


def test_a_consumed_model_is_freed_and_comes_back(monkeypatch):
    kept, given = lora_model(), lora_model()
    trainer = make_step(given, config(scan_layers=True), consume=True)
    assert given.layers[0].mlp.up_proj.kernel[...].is_deleted()
    assert trainer.frozen["layers.*.mlp.up_proj.kernel"].shape[0] == 2
    back = trainer.model(trainer.init())
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(back)), nnx.to_flat_state(nnx.state(kept)), strict=True
    ):
        np.testing.assert_array_equal(one.get_value(), other.get_value(), err_msg=str(path))
    state, made, jit = trainer.init(), [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **kwargs: made.append(f) or jit(f, **kwargs))
    trainer.model(state)  # an evaluation's: no program is made anew
    assert not made


def test_a_step_lowers_from_shapes_alone():
    trainer = make_step(lora_model(), config(scan_layers=True))
    batch = random_batch(0)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    assert "while" in trainer.lower(shapes).as_text()
    assert jax.tree.map(np.shape, trainer.init()) == jax.tree.map(
        lambda x: x.shape, trainer.abstract_state()
    )


def test_a_ratio_of_warm_up_leaves_a_step():
    for total, steps in ((1, 0), (2, 1), (100, 5)):
        assert OptimizerConfig(total_steps=total).num_warmup_steps == steps
    assert OptimizerConfig(total_steps=1, warmup_steps=1).num_warmup_steps == 1


def test_what_does_not_fit_is_refused():
    model = lora_model()
    with pytest.raises(ValueError, match="add_lora"):
        make_step(without_lora(model), config())
    with pytest.raises(ValueError, match="merge_lora"):
        make_step(model, config(trainable="all"))
    with pytest.raises(ValueError, match="without adapters"):
        config(trainable="all", loss=LossConfig(self_distill=1.0))
    with pytest.raises(ValueError, match=r"schedule.*'linaer'"):
        OptimizerConfig(schedule="linaer")
    with pytest.raises(ValueError, match=r"decay_steps.*warmup_stable_decay.*'cosine'"):
        OptimizerConfig(decay_steps=5)
    trainer = make_step(model, config(accumulate=3))
    state = trainer.init()
    with pytest.raises(ValueError, match="multiple of accumulate=3"):
        trainer(state, random_batch(0))
    with pytest.raises(ValueError, match=r"none of \['targets'\]"):
        trainer(state, {**random_batch(0), "targets": None})
    empty = random_batch(0, num_rows=3)
    empty["loss_weights"][:] = 0.0
    with pytest.raises(ValueError, match="no answers"):
        trainer(state, empty)
    short = random_batch(0, num_rows=3)
    short["targets"] = short["targets"][:, :-1]
    with pytest.raises(ValueError, match=r"targets of shape \(3, 24\)"):
        trainer(state, short)
    sharded = make_step(lora_model(mesh=sharding.make_mesh(fsdp=8)), config())
    with pytest.raises(ValueError, match="fsdp=8 = 8, got 6"):
        sharded(sharded.init(), random_batch(0, num_rows=6))


def test_layers_that_differ_are_unrolled_or_refused():
    model = lora_model(
        model_type="gemma3_text",
        query_pre_attn_scalar=16,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_local_base_freq=500.0,
    )
    with pytest.raises(ValueError, match="layer 1 unlike layer 0"):
        make_step(model, config(scan_layers=True))
    assert not make_step(model, config(scan_layers="auto"))._student.scanned
