"""Chunked losses against whole logits and JAX's own gradients, and against finite differences."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swaa_jax import losses, sharding
from swaa_jax.losses import LossConfig, chunked_loss
from swaa_jax.models.head import VocabHead
from tests.support import tpu_compiler

B, T, D, V = 8, 10, 16, 24
CASES = {
    "reverse kl": LossConfig(sft=0.2, others={"reverse_kl": 0.9}, temperature=1.5, chunk_tokens=7),
    "sft": LossConfig(chunk_tokens=7),
    "one chunk": LossConfig(),
    "kl": LossConfig(sft=0.0, self_distill=1.0, chunk_tokens=7),
    "hot kl": LossConfig(sft=0.3, self_distill=0.7, temperature=2.5, chunk_tokens=16),
    "top 5": LossConfig(sft=0.5, self_distill=2.0, temperature=0.7, top_k=5, chunk_tokens=7),
    "top all": LossConfig(sft=0.0, self_distill=1.0, top_k=99, chunk_tokens=7),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    hidden, teacher = rng.normal(size=(2, B, T, D)).astype(np.float32)
    matrix = rng.normal(size=(V, D)).astype(np.float32) * 0.5
    targets = rng.integers(0, V, (B, T))
    weights = rng.uniform(0.5, 2.0, (B, T)) * (rng.uniform(size=(B, T)) < 0.4)
    weights[2] = 0.0  # more than a chunk without any weight
    weights[3, :4] = 0.0
    weights = weights.astype(np.float32)
    return [jnp.asarray(x) for x in (hidden, teacher, matrix, targets, weights)]


def dense(hidden, matrix, teacher, targets, weights, *, config, softcap):
    """The same total, from whole logits."""

    def logits(x):
        raw = x @ matrix.T
        return raw if softcap is None else softcap * jnp.tanh(raw / softcap)

    student = jax.nn.log_softmax(logits(hidden))
    nll = -jnp.take_along_axis(student, targets[..., None], axis=-1)[..., 0]
    total = config.sft * nll
    if config.self_distill:
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits(teacher)) / config.temperature)
        log_s = jax.nn.log_softmax(logits(hidden) / config.temperature)
        p, s = jnp.exp(log_p), jnp.exp(log_s)
        if config.top_k is not None and config.top_k < V:
            _, best = jax.lax.top_k(log_p, config.top_k)
            p, s = (jnp.take_along_axis(x, best, axis=-1) for x in (p, s))
            p, s = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, s))
        kl = jnp.sum(p * (jnp.log(p) - jnp.log(s)), axis=-1)
        total += config.self_distill * config.temperature**2 * kl
    if "reverse_kl" in config.factors:
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits(teacher)) / config.temperature)
        log_s = jax.nn.log_softmax(logits(hidden) / config.temperature)
        kl = jnp.sum(jnp.exp(log_s) * (log_s - log_p), axis=-1)
        total += config.factors["reverse_kl"] * config.temperature**2 * kl
    return jnp.sum(weights * total)


@pytest.mark.parametrize(
    "name, tied, softcap",
    [
        ("sft", True, None),
        ("one chunk", False, 3.0),
        ("kl", False, None),
        ("hot kl", True, 3.0),
        ("top 5", False, 3.0),
        ("top all", True, None),
        ("reverse kl", False, 3.0),
    ],
)
def test_values_and_gradients_equal_those_of_whole_logits(name, tied, softcap):
    config = CASES[name]
    hidden, teacher, matrix, targets, weights = arrays()

    def ours(hidden, matrix):
        head = VocabHead(
            weight=matrix if tied else matrix.T,
            vocab_axis=0 if tied else 1,
            softcap=softcap,
        )
        sums, _ = chunked_loss(
            hidden,
            head,
            targets,
            weights,
            config=config,
            teacher=teacher,
            trains_head=True,
        )
        return sums.total

    def oracle(hidden, matrix):
        # The teacher's logits have no gradient in the matrix.
        return dense(
            hidden,
            matrix,
            teacher,
            targets,
            weights,
            config=config,
            softcap=softcap,
        )

    got, got_slopes = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, matrix)
    want, want_slopes = jax.jit(jax.value_and_grad(oracle, argnums=(0, 1)))(hidden, matrix)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(ours(hidden, matrix), want, rtol=2e-6)  # without a gradient
    for one, other in zip(got_slopes, want_slopes, strict=True):
        # float32 sums over at most 80 tokens, in another order.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_has_no_gradient_and_metrics_are_counts():
    hidden, _, matrix, targets, weights = arrays()
    config = LossConfig(chunk_tokens=7)

    def total(hidden, matrix):
        head = VocabHead(weight=matrix, vocab_axis=0)
        sums, none = chunked_loss(hidden, head, targets, weights, config=config)
        assert none is None
        return sums.total, sums

    slopes, sums = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, matrix)
    assert np.any(slopes[0]) and not np.any(slopes[1])
    right = np.argmax(hidden @ matrix.T, axis=-1) == targets
    np.testing.assert_allclose(sums.correct, np.sum(weights * right), rtol=1e-6)
    np.testing.assert_allclose(sums.weight, np.sum(weights), rtol=1e-6)
    np.testing.assert_allclose(sums.total, sums.parts["nll"])


@pytest.mark.parametrize("name", ["sft", "top 5"])
def test_finite_differences(name):
    hidden, teacher, matrix, targets, weights = arrays(1)
    config = CASES[name]

    def total(hidden):
        head = VocabHead(weight=matrix, vocab_axis=0, softcap=5.0)
        sums, _ = chunked_loss(hidden, head, targets, weights, config=config, teacher=teacher)
        return sums.total

    direction = np.random.default_rng(2).normal(size=hidden.shape).astype(np.float32)
    step = 1e-2
    slope = np.sum(np.asarray(jax.grad(total)(hidden)) * direction)
    there, back = total(hidden + step * direction), total(hidden - step * direction)
    # float32 values near 100 over a step of 1e-2, and the third derivative times 1e-4.
    np.testing.assert_allclose((there - back) / (2 * step), slope, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    "sizes, trained, each, name",
    [
        ({"fsdp": 8}, True, True, "top 5"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, True, False, "top 5"),
        ({"fsdp": 2, "tensor": 4}, False, True, "top 5"),
        ({"data": 2, "tensor": 4}, False, False, "reverse kl"),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(sizes, trained, each, name):
    mesh = sharding.make_mesh(**sizes)
    hidden, teacher, matrix, targets, weights = arrays()
    config = CASES[name]

    def total(hidden, matrix, mesh):
        head = VocabHead(weight=matrix, vocab_axis=0, axes=("vocab", "embed"))
        found = chunked_loss(
            hidden,
            head,
            targets,
            weights,
            config=config,
            teacher=teacher,
            trains_head=trained,
            each_target=each,
            mesh=mesh,
        )
        return found[0].total, found

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    one, many = run(hidden, matrix, None), run(hidden, matrix, mesh)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), many, one)


def entropy_and_z(logits, targets, teacher, *, vocabulary, config):
    """Not in the table: the entropy, and the square of the log partition function."""
    del targets, teacher, config
    lse = vocabulary.logsumexp(logits)
    log_p = logits - lse[:, None]
    return 0.1 * lse**2 - vocabulary.sum(jnp.exp(log_p) * log_p)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_another_loss_is_a_function_and_a_line(monkeypatch, sizes):
    monkeypatch.setitem(losses.LOSSES, "entropy_and_z", losses.Loss(per_token=entropy_and_z))
    config = LossConfig(sft=0.5, others={"entropy_and_z": 0.25}, chunk_tokens=7)
    mesh = None if sizes is None else sharding.make_mesh(**sizes)
    hidden, _, matrix, targets, weights = arrays(3)

    def ours(hidden, matrix):
        head = VocabHead(weight=matrix, vocab_axis=0, axes=("vocab", "embed"), softcap=4.0)
        sums, _ = chunked_loss(
            hidden, head, targets, weights, config=config, trains_head=True, mesh=mesh
        )
        return sums.total, sums

    def oracle(hidden, matrix):
        logits = 4.0 * jnp.tanh(hidden @ matrix.T / 4.0)
        lse, log_p = jax.nn.logsumexp(logits, axis=-1), jax.nn.log_softmax(logits)
        other = jnp.sum(weights * (0.1 * lse**2 - jnp.sum(jnp.exp(log_p) * log_p, axis=-1)))
        nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return 0.5 * jnp.sum(weights * nll) + 0.25 * other, other

    gradients = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (got, sums), got_slopes = jax.jit(gradients(ours))(hidden, matrix)
    (want, other), want_slopes = jax.jit(gradients(oracle))(hidden, matrix)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(sums.parts["entropy_and_z"], other, rtol=2e-6)
    for one, another in zip(got_slopes, want_slopes, strict=True):
        # float32 sums over at most 80 tokens, in another order.
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-5)


def test_what_became_of_each_target():
    hidden, _, matrix, targets, weights = arrays()

    def total(hidden):
        head = VocabHead(weight=matrix, vocab_axis=0)
        sums, each = chunked_loss(
            hidden, head, targets, weights, config=CASES["sft"], each_target=True
        )
        return sums.total, each

    (_, found), slope = jax.value_and_grad(total, has_aux=True)(hidden)
    _, alone = total(hidden)  # without a gradient
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    nll = np.log(np.exp(logits).sum(-1)) - picked
    for each in (found, alone):  # whatever a target weighs
        np.testing.assert_allclose(each.nll, nll, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(each.correct, logits.argmax(-1) == targets)
    assert not np.any(slope[2]) and np.any(slope[0])


def test_wrong_calls_are_refused():
    hidden, _, matrix, targets, weights = arrays()
    head = VocabHead(weight=matrix, vocab_axis=0)
    with pytest.raises(ValueError, match="teacher"):
        chunked_loss(hidden, head, targets, weights, config=CASES["kl"])
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(ValueError, match=r"fsdp=8 = 8, got 3"):
        chunked_loss(hidden[:3], head, targets[:3], weights[:3], config=CASES["sft"], mesh=mesh)
    with pytest.raises(ValueError, match="nothing would be trained"):
        LossConfig(sft=0.0)
    with pytest.raises(ValueError, match="temperature"):
        LossConfig(temperature=0.0)
    with pytest.raises(ValueError, match="others: expected keys among reverse_kl, got 'kl'"):
        LossConfig(others={"kl": 1.0})
    with pytest.raises(ValueError, match=r"others.reverse_kl: expected a number of at least 0"):
        LossConfig(others={"reverse_kl": -1.0})
    for value in (3, None, "reverse_kl"):
        with pytest.raises(ValueError, match="others: expected a mapping, got"):
            LossConfig(others=value)
    with pytest.raises(
        ValueError, match=r"top_k: expected None, got 8 \(int\); reverse_kl compares all"
    ):
        LossConfig(others={"reverse_kl": 1.0}, top_k=8)


def tpu_memory(case):
    """Bytes by the TPU compiler: 32k tokens of a vocabulary of 152k, width 2560, on a v5e."""
    done = tpu_compiler.run_script("tests/support/compile_loss.py", case)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_frozen_head_takes_little_memory_on_a_tpu():
    found = tpu_memory("frozen")
    assert found["arguments"] > 0.9e9  # the head and the hidden states are in it
    assert found["temporaries"] <= 0.35e9
    assert found["peak"] <= 1.5e9


@pytest.mark.slow
@pytest.mark.parametrize("case, temporaries", [("trained", 1.2e9), ("distilled", 0.35e9)])
def test_other_losses_on_a_tpu(case, temporaries):
    """A trained head of 0.78 GB in bfloat16 has its gradient, and its own values, in float32."""
    assert tpu_memory(case)["temporaries"] <= temporaries
