"""The backends that run on a GPU against the dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import swa_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

BACKENDS = ("pallas_gpu", "cudnn", "xla")
T = 300
LENGTHS = jnp.array([T, T // 3, 1])
FULL_ROWS = jnp.arange(T)[None] >= jnp.array([[T // 2], [T // 4], [0]])
CASES = {
    "full": {"window": None},
    "window": {"window": 64},
    "sinks": {"window": 64, "num_sink_tokens": 4},
    "full_lengths": {"window": None, "lengths": LENGTHS},
    "window_lengths": {"window": 64, "lengths": LENGTHS},
    "full_rows": {"window": 64, "num_sink_tokens": 4, "lengths": LENGTHS, "q_full": FULL_ROWS},
    "self_only": {"window": 1},
    "many_sinks": {"window": 40, "num_sink_tokens": 130},
    "window_full_rows": {"window": 64, "q_full": FULL_ROWS},
}
# The end of a sequence of S keys, of which some are not written yet.
S = 1000
OFFSETS = jnp.array([S - T, 0, 130])
CHUNKS = {
    "at_start": {"window": None, "q_offset": jnp.zeros(3, int), "lengths": LENGTHS},
    "full": {"window": None, "q_offset": OFFSETS, "lengths": OFFSETS + LENGTHS},
    "window": {"window": 64, "q_offset": OFFSETS, "lengths": OFFSETS + LENGTHS},
    "sinks": {"window": 200, "num_sink_tokens": 10, "q_offset": OFFSETS},
    "full_rows": {"window": 64, "num_sink_tokens": 4, "q_offset": OFFSETS, "q_full": FULL_ROWS},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_reference(case, backend):
    assert_equals_the_reference(backend, num_keys=T, **CASES[case])


@pytest.mark.parametrize("backend", ("pallas_gpu", "xla"))
@pytest.mark.parametrize("case", CHUNKS)
def test_the_end_of_a_longer_sequence(case, backend):
    assert_equals_the_reference(backend, num_keys=S, **CHUNKS[case])


@pytest.mark.parametrize("head_dim", (64, 96, 256))
def test_every_head_dim(head_dim):
    assert_equals_the_reference("pallas_gpu", num_keys=S, head_dim=head_dim, **CHUNKS["sinks"])


def assert_equals_the_reference(backend, *, num_keys, head_dim=128, **keywords):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (3, tokens, heads, head_dim), jnp.bfloat16)
        for key, tokens, heads in zip(keys, (T, num_keys, num_keys, T), (4, 2, 2, 4), strict=True)
    )

    def run(backend, *arrays):
        def loss(*arrays):
            out = swa_prefill(*arrays, backend=backend, **keywords)
            return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, out), gradients = run(*arrays)
        return out, *gradients

    got = run(backend, q, k, v)
    with jax.default_matmul_precision("highest"):
        expected = run("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for one, other in zip(got, expected, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        # bf16 has 8 bits: 2**-8 = 4e-3 relative a rounding. Zero gradients (window 1) are absolute.
        assert np.linalg.norm(one - other) <= 1e-2 * max(np.linalg.norm(other), 1.0)
