"""Whole models on a named backend: the TPU kernels, interpreted, against plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

import swaa_jax as swaa
from swaa_jax.sharding import make_mesh
from tests.support.random_models import random_model

# Layer 0: a window with sinks, in a ring. Layer 1: full.
POLICY = swaa.AttentionPolicy(window=16, num_sink_tokens=2, full_attention_layers="1::2")
SHAPE = {"num_hidden_layers": 2, "head_dim": 64}  # the smallest head dim that the kernels take
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 40)))
LENGTHS = jnp.array([40, 23])
NEW = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 1)))


def model_on(backend, **more):
    return random_model(POLICY, backend=backend, **SHAPE, **more)


def steps(model):
    """Logits of a prompt, and of two tokens, one at a time."""
    pre = nnx.jit(lambda model: model.prefill(TOKENS, lengths=LENGTHS, cache_size=48))(model)
    decode = nnx.jit(lambda model, caches: model.decode(NEW, caches))
    first, caches = decode(model, pre.caches)
    second, _ = decode(model, caches)
    return pre.logits, first, second


def gradients(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graph, params, rest)(TOKENS, lengths=LENGTHS)
        real = jnp.arange(TOKENS.shape[1])[None, :] < LENGTHS[:, None]
        return jnp.sum(jnp.where(real[..., None], jax.nn.log_softmax(logits), 0) ** 2) / 1e4

    return jax.jit(jax.grad(loss))(params)


def assert_close(got, wanted):
    # float32 throughout; the kernels add up in another order, in base 2.
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_tpu_kernels_on_a_mesh_equal_xla_on_one_device():
    """Prefill, decode steps, ring and full caches."""
    mesh = make_mesh(jax.devices()[:4], data=2, tensor=2)
    with pltpu.force_tpu_interpret_mode():
        got = steps(model_on("pallas_tpu", mesh=mesh))
    assert_close(got, steps(model_on("xla")))


@pytest.mark.slow
@pytest.mark.parametrize("run", [steps, gradients])
def test_the_tpu_kernels_equal_xla_on_one_device(run):
    with pltpu.force_tpu_interpret_mode():
        got = run(model_on("pallas_tpu"))
    assert_close(got, run(model_on("xla")))


@pytest.mark.parametrize(
    "choice, kernels",
    [
        ("pallas_tpu", {"swa_prefill_forward", "swa_decode"}),
        ("swa_decode=pallas_tpu", {"swa_decode"}),
        ("swa_prefill=pallas_tpu,swa_decode=reference", {"swa_prefill_forward"}),
        ("auto", set()),
    ],
)
def test_the_choice_reaches_the_kernels(choice, kernels):
    with pltpu.force_tpu_interpret_mode():
        assert kernels_of(model_on(choice)) == kernels


def test_a_model_keeps_its_backend_and_refuses_what_cannot_run(monkeypatch):
    model = model_on("swa_decode=reference")
    assert model.with_policy(swaa.AttentionPolicy()).backend == "swa_decode=reference"
    assert nnx.split(model)[0] != nnx.split(model_on("auto"))[0]
    with pytest.raises(NotImplementedError, match="'pallas_tpu' expects platform 'tpu', got 'cpu'"):
        swaa.load_model("tiny-retriever", backend="pallas_tpu")
    with pytest.raises(ValueError, match=r"expected one of .*, got 'cuda'"):
        swaa.load_model("tiny-retriever", backend="cuda")
    assert swaa.load_model("tiny-retriever", backend="xla").backend == "xla"
    monkeypatch.setenv("SWAA_BACKEND", "pallas_tpu")
    with pytest.raises(NotImplementedError, match="'pallas_tpu' expects platform 'tpu'"):
        swaa.load_model("tiny-retriever")


def kernels_of(model):
    """Names of the Pallas kernels in the program of a prompt and a token."""

    def prompt_and_token(model):
        return model.decode(NEW, model.prefill(TOKENS, lengths=LENGTHS).caches)

    text = str(jax.make_jaxpr(prompt_and_token)(model))
    return {name for name in ("swa_prefill_forward", "swa_decode") if name in text}
