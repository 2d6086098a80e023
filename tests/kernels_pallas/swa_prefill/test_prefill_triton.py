"""The Triton kernel, interpreted, against the dense reference, with NaN in all that is padding."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas import swa_prefill
from kernels_pallas.backends import choose_backend
from kernels_pallas.swa_prefill import pallas_triton, reference
from kernels_pallas.swa_prefill.arguments import PrefillArguments

SMALL = pallas_triton.Tiles(block_q=16, block_kv=16)
B, T, S = 2, 40, 90
# The softmax weights are rounded before they meet the values, and the result is: 2^-8 each.
RTOL = {"bfloat16": 3 * 2.0**-8, "float16": 3 * 2.0**-11}


def arrays(dtype, heads=(4, 2), head_dim=16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, heads[0]), (B, S, heads[1]), (B, S, heads[1]))
    return tuple(jnp.asarray(rng.standard_normal((*x, head_dim)), dtype) for x in shapes)


def with_nan(k, offset, lengths):
    """NaN in keys that no query sees: behind the length and behind the last query."""
    ends = np.minimum(np.asarray(lengths), np.asarray(offset) + T)
    hidden = np.arange(S)[None] >= ends[:, None]
    return jnp.where(hidden[:, :, None, None], jnp.nan, k)


@functools.cache
def compiled(dtype, *, is_full, has_full_rows, softcap, tiles=SMALL):
    def run(q, k, v, known):
        known = dict(known)
        if is_full:
            known["window"] = None
        if not has_full_rows:
            known.pop("q_full")
        arguments = PrefillArguments(q=q, k=k, v=v, scale=0.3, softcap=softcap, **known)
        got = pallas_triton.attend_in_blocks(arguments, tiles=tiles, interpret=True).out
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        q, k, v = (jnp.nan_to_num(x) for x in exact)
        arguments = PrefillArguments(q=q, k=k, v=v, scale=0.3, softcap=softcap, **known)
        return got, reference.compute(arguments).out

    return jax.jit(run)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("is_full, has_full_rows", [(True, False), (False, False), (False, True)])
def test_chunks_equal_the_reference(is_full, has_full_rows, data):
    draw = data.draw
    offset = np.array([draw(st.integers(0, S - T)) for _ in range(B)], np.int32)
    lengths = offset + np.array([draw(st.integers(0, T)) for _ in range(B)], np.int32)
    q, k, v = arrays("bfloat16", seed=draw(st.integers(0, 99)))
    k, v = (with_nan(x, offset, lengths) for x in (k, v))
    known = {
        "q_offset": jnp.asarray(offset),
        "lengths": jnp.asarray(lengths),
        "window": jnp.int32(draw(st.integers(1, S))),
        "num_sink_tokens": jnp.int32(draw(st.integers(0, 40))),
        "q_full": jnp.asarray(np.random.default_rng(0).random((B, T)) < draw(st.floats(0, 1))),
    }
    run = compiled("bfloat16", is_full=is_full, has_full_rows=has_full_rows, softcap=None)
    got, want = run(q, k, v, known)
    assert_close(got, want, "bfloat16")


@pytest.mark.parametrize("tiles", [(64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", RTOL)
def test_blocks_types_and_caps(dtype, tiles):
    tiles = pallas_triton.Tiles(block_q=tiles[0], block_kv=tiles[1])
    known = {
        "q_offset": jnp.array([50, 7], jnp.int32),
        "lengths": jnp.array([90, 30], jnp.int32),
        "window": jnp.int32(20),
        "num_sink_tokens": jnp.int32(3),
        "q_full": jnp.zeros((B, T), bool),
    }
    run = compiled(dtype, is_full=False, has_full_rows=False, softcap=1.5, tiles=tiles)
    got, want = run(*arrays(dtype), known)
    assert_close(got, want, dtype)


def test_gradients_are_those_of_xla():
    def loss(q, k, v, backend):
        known = {"window": 9, "num_sink_tokens": 2, "q_offset": 50, "scale": 0.3}
        if backend == "pallas_triton":
            arguments = PrefillArguments(q=q, k=k, v=v, **known)
            out = pallas_triton.attend_in_blocks(arguments, tiles=SMALL, interpret=True).out
        else:
            out = swa_prefill(q, k, v, backend=backend, **known)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    given = arrays("bfloat16")
    gradients = [
        jax.grad(loss, argnums=(0, 1, 2))(*given, backend) for backend in ("pallas_triton", "xla")
    ]
    for got, want in zip(*gradients, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        # The cotangent is of an output that is rounded twice, apart.
        assert np.linalg.norm(got - want) <= 2.0**-7 * np.linalg.norm(want)


def test_auto_takes_it_for_chunks_on_gpus_alone():
    from kernels_pallas.backends import Target

    q, k, v = arrays("bfloat16")
    on_gpu = {"window": 9, "scale": 1.0, "target": Target(platform="gpu", device_kind="any")}
    chunk = PrefillArguments(q=q, k=k, v=v, q_offset=50, **on_gpu)
    whole = PrefillArguments(q=q, k=k[:, :T], v=v[:, :T], **on_gpu)
    assert choose_backend("swa_prefill", "auto", chunk) == "pallas_triton"
    assert choose_backend("swa_prefill", "auto", whole) == "cudnn"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"segment_ids": jnp.zeros((B, S), jnp.int32)}, "segment_ids: expected None"),
        ({"return_lse": True}, "return_lse: expected False"),
    ],
)
def test_what_it_cannot_compute_is_named(change, words):
    q, k, v = arrays("bfloat16")
    arguments = PrefillArguments(q=q, k=k, v=v, window=None, scale=1.0, **change)
    assert any(words in limit for limit in pallas_triton.limits(arguments))
    q, k, v = arrays("float32")
    float32 = PrefillArguments(q=q, k=k, v=v, window=None, scale=1.0)
    assert any("bfloat16" in limit for limit in pallas_triton.limits(float32))


def assert_close(got, want, dtype):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, atol=RTOL[dtype] * max(1.0, np.abs(want).max()))
