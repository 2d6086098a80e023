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

BACKENDS = ("pallas_gpu", "pallas_triton", "cudnn", "xla")
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


@pytest.mark.parametrize("backend", ("pallas_gpu", "pallas_triton", "xla"))
@pytest.mark.parametrize("case", CHUNKS)
def test_the_end_of_a_longer_sequence(case, backend):
    assert_equals_the_reference(backend, num_keys=S, **CHUNKS[case])


@pytest.mark.parametrize("head_dim", (64, 96, 256))
def test_every_head_dim_of_triton(head_dim):
    assert_equals_the_reference("pallas_triton", num_keys=S, head_dim=head_dim, **CHUNKS["sinks"])


SEGMENTS = jnp.cumsum(jnp.isin(jnp.arange(T), jnp.array([1, 90, 170])), dtype=jnp.int32)
ONLY_PALLAS = {
    "segments": {"window": 40, "num_sink_tokens": 5, "segment_ids": jnp.tile(SEGMENTS, (3, 1))},
    "packed": {"window": None, "segment_ids": jnp.tile(SEGMENTS, (3, 1)), "q_full": FULL_ROWS},
    "softcap": {"window": 40, "num_sink_tokens": 5, "softcap": 2.0},
    "by_row": {"window": jnp.array([9, 100, 300]), "num_sink_tokens": jnp.array([3, 0, 150])},
    "scale": {"window": 64, "scale": 0.3},
}


@pytest.mark.parametrize("case", ONLY_PALLAS)
def test_what_only_pallas_gpu_takes(case):
    assert_equals_the_reference("pallas_gpu", num_keys=T, **ONLY_PALLAS[case])


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("heads", ((1, 1), (4, 1), (6, 2), (8, 2)))
@pytest.mark.parametrize("head_dim", (64, 80, 96, 128, 256))
def test_every_head_dim_and_group(head_dim, heads, dtype):
    assert_equals_the_reference(
        "pallas_gpu", num_keys=S, head_dim=head_dim, heads=heads, dtype=dtype, **CHUNKS["sinks"]
    )


@pytest.mark.parametrize("tokens", (64, 127, 4096))
def test_many_tiles_of_each_block_of_threads(tokens):
    """4,096 tokens of 3 rows are 3,072 tiles, of which each block of threads has 23 or 24."""
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (
        jax.random.normal(key, (3, tokens, heads, 128), jnp.bfloat16)
        for key, heads in zip(keys, (32, 8, 8), strict=True)
    )
    known = {"window": 300, "num_sink_tokens": 4}
    got = jax.jit(lambda *x: swa_prefill(*x, backend="pallas_gpu", **known))(q, k, v)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        want = jax.jit(lambda *x: swa_prefill(*x, backend="xla", **known))(*exact)
    assert_close(got, want)


def test_what_a_loop_saves_is_computed_once():
    """Outputs that are stacked for a backward pass, and read in the forward one."""

    def attend(x, factor):
        out = swa_prefill(x * factor, x, x, window=300, num_sink_tokens=4, backend="pallas_gpu")
        return x + out, None

    def loss(x):
        return jnp.sum(jax.lax.scan(attend, x, jnp.arange(3, dtype=x.dtype))[0])

    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3  # forward, dq, dk and dv


def assert_equals_the_reference(
    backend, *, num_keys, head_dim=128, heads=(4, 2), dtype="bfloat16", **keywords
):
    keys = jax.random.split(jax.random.key(0), 4)
    many, few = heads
    q, k, v, weights = (
        jax.random.normal(key, (3, tokens, heads, head_dim), dtype)
        for key, tokens, heads in zip(
            keys, (T, num_keys, num_keys, T), (many, few, few, many), strict=True
        )
    )

    def run(backend, *arrays):
        def loss(*arrays):
            out = swa_prefill(*arrays, backend=backend, **keywords)
            return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32))

        # Apart, since the output beside a gradient may be another kernel's.
        out = jax.jit(lambda *x: swa_prefill(*x, backend=backend, **keywords))(*arrays)
        return out, *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    got = run(backend, q, k, v)
    with jax.default_matmul_precision("highest"):
        exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
        expected = run("reference", *exact)
        want = swa_prefill(*exact, backend="reference", return_lse=True, **keywords)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    if backend == "pallas_gpu":
        hidden = hidden_keys(num_keys, keywords)[:, :, None, None]
        k, v = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
        found = jax.jit(lambda *x: swa_prefill(*x, backend=backend, return_lse=True, **keywords))(
            q, k, v
        )
        assert_close(found.out, want.out)
        some = np.isfinite(np.asarray(want.lse))
        np.testing.assert_array_equal(np.isfinite(np.asarray(found.lse)), some)
        assert_close(np.asarray(found.lse)[some], np.asarray(want.lse)[some])


def hidden_keys(num_keys, keywords):
    """Bool [B, S]: behind the length, or behind the last query."""
    ends = jnp.broadcast_to(keywords.get("q_offset", jnp.int32(0)), (3,)) + T
    ends = jnp.minimum(ends, keywords.get("lengths", jnp.full((3,), num_keys)))
    return jnp.arange(num_keys)[None] >= ends[:, None]


def assert_close(one, other):
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    # bf16 has 8 bits: 2**-8 = 4e-3 relative a rounding. Zero gradients (window 1) are absolute.
    assert np.linalg.norm(one - other) <= 1e-2 * max(np.linalg.norm(other), 1.0)
