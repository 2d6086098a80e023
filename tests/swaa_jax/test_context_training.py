"""Training and scoring of rows whose tokens are split over devices, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.train import LossConfig, OptimizerConfig, StepConfig, make_step
from tests.support.devices import mesh_of
from tests.support.random_models import random_model
from tests.support.training import gradient, lora_model, random_batch, to_host

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": True,
}
POLICIES = {
    "windows": "window=5,sinks=2",
    "full layers": "window=5,sinks=2,full_layers=1::2",
    "answers": "window=5,sinks=2,full_layers=1::2,decode=full",
    "wide": "window=40,sinks=9,tail=2",
}
# Rows of two and three texts, 24 tokens or 27, of which no shard's size is a divisor.
CASES = {
    "windows": {"policy": "windows", "num_layers": 3},
    "full layers": {"policy": "full layers", "width": 27},
    "answers": {"policy": "answers", "width": 27, "scan_layers": True, "remat": "layer"},
    "wide": {"policy": "wide", "trainable": "all"},
    "experts": {"policy": "full layers", "experts": True, "width": 27},
    "teacher": {"policy": "full layers", "loss": LossConfig(self_distill=0.5)},
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, total_steps=20)


def trainer_of(
    mesh,
    *,
    policy,
    width=24,
    num_layers=2,
    trainable="lora",
    experts=False,
    loss=None,
    **settings,
):
    del width
    make = random_model if trainable == "all" else lora_model
    model = make(
        swaa.AttentionPolicy.parse(POLICIES[policy]),
        mesh=mesh,
        backend="reference",
        num_hidden_layers=num_layers,
        **(EXPERTS if experts else {}),
    )
    config = StepConfig(
        optimizer=OPTIMIZER,
        dtype="float32",
        trainable=trainable,
        target_losses=True,
        loss=loss or LossConfig(),
        **{"scan_layers": False, **settings},
    )
    return make_step(model, config)


def batch_of(seed, *, width=24, **_):
    return random_batch(seed, num_rows=4, width=width)


def first_gradient(mesh, **case):
    trainer = trainer_of(mesh, **case)
    return to_host(gradient(trainer, trainer.init(), batch_of(0, **case)))


@functools.cache
def gradient_of_one_device(name):
    return first_gradient(None, **CASES[name])


def assert_equal(got, want):
    # float32; sums over devices are added in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


MESHES = [{"context": 8}, {"context": 4, "tensor": 2}, {"context": 2, "fsdp": 2, "expert": 2}]
QUICK = {("windows", 0), ("full layers", 1), ("experts", 2)}


@pytest.mark.parametrize(
    "sizes, name",
    [
        pytest.param(
            *(sizes, name),
            marks=() if (name, at) in QUICK else pytest.mark.slow,
            id=f"{name}-{at}",
        )
        for at, sizes in enumerate(MESHES)
        for name in CASES
    ],
)
def test_loss_and_gradients_are_those_of_one_device(sizes, name):
    got = first_gradient(mesh_of(**sizes), **CASES[name])
    assert got[1]["target_nll"].shape == (1, 4, CASES[name].get("width", 24))
    assert_equal(got, gradient_of_one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_five_steps_are_those_of_one_device(sizes):
    case = {**CASES["answers"], "accumulate": 2}

    def five(mesh):
        trainer = trainer_of(mesh, **case)
        state, history = trainer.init(), []
        for seed in range(5):
            state, metrics = trainer(state, batch_of(seed, **case))
            history.append(metrics)
        assert trainer.num_compiles() == 1
        return to_host(state.trainable), to_host(history)

    assert_equal(five(mesh_of(**sizes)), five(None))


def test_scores_are_those_of_one_device():
    """Rows of any length, under any way to call the model."""
    policy = swaa.AttentionPolicy.parse(POLICIES["answers"])
    mesh = mesh_of(context=4, fsdp=2)
    one = random_model(policy, num_hidden_layers=2, backend="reference")
    many = random_model(policy, num_hidden_layers=2, backend="reference", mesh=mesh)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 61, (2, 13)))
    stages = jnp.asarray(rng.integers(0, 2, (2, 13)))

    def runs(model):
        whole = model(tokens, stage_ids=stages)
        short = model(tokens[:, :3], lengths=jnp.array([3, 1]), logits_at="last")
        read = model.prefill(tokens, lengths=jnp.array([13, 6]), cache_size=24)
        after, _ = model.decode(tokens[:, :4], read.caches)
        return whole, short, read.logits, after

    want = jax.jit(lambda: runs(one))()
    got = jax.jit(lambda: runs(many))()
    assert got[0].shape == (2, 13, 61)
    for some, other in zip(got, want, strict=True):
        np.testing.assert_allclose(some, other, rtol=1e-4, atol=1e-4)  # as in test_sharding
