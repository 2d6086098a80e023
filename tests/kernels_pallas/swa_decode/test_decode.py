"""Decode backends against a loop on positions, with NaN in every slot that is not seen."""

import contextlib
import functools
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas import backends, swa_decode, swa_prefill
from kernels_pallas.swa_decode import pallas_tpu, pallas_triton
from kernels_pallas.swa_decode.xla import products_on
from tests.support import bruteforce

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_triton")
# The kernels, interpreted, in blocks so small that a cache has several, the last cut short.
INTERPRETED = {
    pallas_tpu: functools.partial(
        pallas_tpu.decode_in_blocks,
        blocks=pallas_tpu.DecodeBlocks(slots=5, splits=2),
        interpret=True,
    ),
    pallas_triton: functools.partial(
        pallas_triton.decode_in_units,
        tiles=pallas_triton.Tiles(block_slots=5, unit_blocks=2),
        interpret=True,
    ),
}
TARGETS = {
    "pallas_tpu": backends.Target(platform="tpu", device_kind="TPU v5 lite"),
    "pallas_triton": backends.Target(platform="gpu", device_kind="NVIDIA H100"),
}
# float32: see the prefill suite. 16-bit: the softmax weights are rounded once before they meet the
# values and the result once after, a unit of 2^-8 (2^-11) each on entries of at most 4.
ATOL = {"float32": 1e-5, "bfloat16": 8 * 2.0**-8, "float16": 8 * 2.0**-11}

# (B, n, S), (N, K, H), soft cap, dtype, whether the new tokens come beside the cache
CASES = {
    "one_token": ((2, 1, 24), (4, 2, 8), None, "float32", True),
    "block": ((2, 5, 24), (4, 1, 8), 1.5, "float32", True),
    "in_cache": ((2, 3, 32), (2, 2, 16), None, "float32", False),
    "bfloat16": ((2, 2, 16), (6, 2, 8), None, "bfloat16", True),
    "float16": ((1, 2, 16), (4, 4, 8), None, "float16", True),
    # The head dims that TPU kernels are for.
    "h64": ((2, 8, 23), (4, 2, 64), None, "bfloat16", True),
    "h80": ((2, 1, 23), (6, 3, 80), None, "float32", True),
    "h96": ((1, 2, 23), (4, 4, 96), None, "float32", True),
    "h128": ((2, 1, 23), (8, 2, 128), 1.5, "bfloat16", True),
    "h256": ((2, 1, 23), (4, 1, 256), None, "float32", True),
}
OTHER_DTYPES = {
    "h64_float32": ((1, 2, 13), (14, 2, 64), None, "float32", False),
    "h80_bfloat16": ((1, 2, 13), (6, 3, 80), 1.5, "bfloat16", True),
    "h96_bfloat16": ((1, 1, 13), (4, 4, 96), None, "bfloat16", True),
    "h128_float32": ((1, 1, 13), (3, 3, 128), None, "float32", True),
    "h256_bfloat16": ((1, 3, 13), (4, 2, 256), None, "bfloat16", False),
}
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_DTYPES)]
CASES |= OTHER_DTYPES


def run_decode(q, *cache, backend, **given):
    """``swa_decode`` with the kernels interpreted, as if for their platforms."""
    if backend in TARGETS:
        given["target"] = TARGETS[backend]
    with contextlib.ExitStack() as stack:
        for module, compute in INTERPRETED.items():
            anything = {"compute": compute, "limits": backends.no_limits}
            stack.enter_context(mock.patch.multiple(module, **anything))
        return swa_decode(q, *cache, backend=backend, **given)


@functools.cache
def compiled(name, backend, is_full):
    softcap = CASES[name][2]

    def run(q, cache, new, drawn):
        new = {} if new is None else {"new_k": new[0], "new_v": new[1]}
        return run_decode(
            q,
            *cache,
            q_positions=drawn["q_positions"],
            cache_positions=drawn["cache_positions"],
            window=None if is_full else drawn["window"],
            num_sink_tokens=drawn["sinks"],
            q_full=drawn["q_full"],
            softcap=softcap,
            return_lse=True,
            backend=backend,
            **new,
        )

    return jax.jit(run)


def drawn_values(data, name):
    (num_batch, num_new, num_slots), _, _, _, beside = CASES[name]

    def ints(strategy):
        return np.asarray([data.draw(strategy) for _ in range(num_batch)], np.int32)

    # Any set of earlier positions in any order (a ring after any history), and empty slots.
    start = ints(st.integers(0, 2 * num_slots))
    rng = np.random.default_rng(data.draw(st.integers(0, 5)))
    cache_positions = np.full((num_batch, num_slots), -1, np.int32)
    for b in range(num_batch):
        room = num_slots if beside else num_slots - num_new
        held = rng.permutation(start[b])[: data.draw(st.integers(0, room))]
        if not beside:
            held = np.concatenate([held, start[b] + np.arange(num_new)])
        cache_positions[b, rng.permutation(num_slots)[: len(held)]] = held
    return {
        "q_positions": start[:, None] + np.arange(num_new, dtype=np.int32),
        "cache_positions": cache_positions,
        "window": ints(st.sampled_from([1, 2, 5, 16, 100])),
        "sinks": ints(st.sampled_from([0, 1, 10, 130])),
        "q_full": np.asarray(
            data.draw(st.integers(0, 2)) > rng.integers(0, 2, (num_batch, num_new))
        ),
    }


@pytest.mark.parametrize("is_full", (False, True), ids=("windowed", "full"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(data=st.data())
def test_against_loop(name, backend, is_full, data):
    (num_batch, num_new, num_slots), (num_heads, num_kv_heads, head_dim), cap, dtype, beside = (
        CASES[name]
    )
    drawn = drawn_values(data, name)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(num_batch, num_new, num_heads, head_dim)
    cache = [normal(num_batch, num_slots, num_kv_heads, head_dim) for _ in "kv"]
    new = [normal(num_batch, num_new, num_kv_heads, head_dim) for _ in "kv"] if beside else None
    rules = {
        "window": None if is_full else drawn["window"],
        "sinks": drawn["sinks"],
        "q_full": drawn["q_full"],
    }
    positions = drawn["cache_positions"]
    if beside:
        positions = np.concatenate([positions, drawn["q_positions"]], axis=1)
    mask = bruteforce.decode_pairs(q_positions=drawn["q_positions"], k_positions=positions, **rules)
    # Empty slots hold NaN, and so does every slot that nobody sees.
    unseen = ~mask.any(axis=1)[:, :num_slots, None, None]
    cache = [jnp.where(unseen, jnp.nan, x) for x in cache]
    k, v = (
        (np.concatenate([a, b], axis=1) for a, b in zip(cache, new, strict=True))
        if beside
        else cache
    )
    wanted = bruteforce.attend(q, k, v, mask, softcap=cap)
    found = compiled(name, backend, is_full)(q, cache, new, drawn)
    assert found.out.dtype == q.dtype
    out = np.asarray(found.out, np.float64)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, wanted.out, atol=ATOL[dtype], rtol=0)
    # Scores are float32 sums whatever the dtype; the loop has those of the rounded arrays.
    np.testing.assert_allclose(found.lse, wanted.lse, atol=ATOL["float32"], rtol=0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (4, 2), (50, 1)])
def test_decoding_continues_prefill(window, sinks, backend):
    """Prefill of 12 tokens, then blocks of 3, 1 and 4: the rows that one prefill of 20 gives."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 20, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 20, 2, 8)), jnp.float32) for _ in "kv")
    answers = jnp.arange(20) >= 14
    policy = dict(window=window, num_sink_tokens=sinks)
    decode = jax.jit(functools.partial(run_decode, backend=backend, **policy))
    whole = jax.jit(functools.partial(swa_prefill, **policy))(
        q, k, v, q_full=jnp.tile(answers, (2, 1))
    )
    begin = 12
    for num_new in (3, 1, 4):
        rows = slice(begin, begin + num_new)
        slots = jnp.where(jnp.arange(20) < begin, jnp.arange(20), -1)
        written = (slots >= 0)[:, None, None]
        out = decode(
            q[:, rows],
            jnp.where(written, k, jnp.nan),
            jnp.where(written, v, jnp.nan),
            q_positions=jnp.tile(jnp.arange(20)[rows], (2, 1)),
            cache_positions=jnp.tile(slots, (2, 1)),
            new_k=k[:, rows],
            new_v=v[:, rows],
            q_full=jnp.tile(answers[rows], (2, 1)),
        )
        np.testing.assert_allclose(out, whole[:, rows], atol=ATOL["float32"], rtol=0)
        begin += num_new


def test_a_row_that_sees_nothing_returns_zeros():
    x = jnp.ones((1, 1, 2, 4))
    for backend in BACKENDS:
        found = run_decode(
            x,
            jnp.full((1, 3, 2, 4), jnp.nan),
            jnp.full((1, 3, 2, 4), jnp.nan),
            q_positions=jnp.array([[7]]),
            cache_positions=jnp.full((1, 3), -1),
            window=4,
            return_lse=True,
            backend=backend,
        )
        np.testing.assert_array_equal(found.out, np.zeros((1, 1, 2, 4)))
        np.testing.assert_array_equal(found.lse, np.full((1, 1, 2), -np.inf))


@pytest.mark.parametrize("num_new", (1, 3))
def test_every_way_to_multiply(num_new):
    """The CPU's own layouts and the one that accelerators run give the same products."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, num_new, 3, 2, 8), (2, 11, 3, 8), (2, 11, 3, 8))
    )
    weights = jnp.asarray(rng.random((2, 3, 2, num_new, 11)), jnp.float32)
    on_cpu = products_on(num_new, platform="cpu")
    elsewhere = products_on(num_new, platform="tpu")
    of_copies = products_on(num_new, platform="cpu", is_copy=True)
    assert on_cpu[0] is not elsewhere[0]
    for index, arrays in enumerate(((q, k), (weights, v))):
        want = elsewhere[index](*arrays)
        for ways in (on_cpu, of_copies):
            np.testing.assert_allclose(ways[index](*arrays), want, atol=ATOL["float32"], rtol=0)


def test_the_cache_is_not_copied():
    """One token against a long cache: K is read in place; V at most once rewritten with zeros."""
    num_slots = 65536
    cache = jax.ShapeDtypeStruct((1, num_slots, 2, 64), jnp.float32)
    new = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.float32)
    slots = jax.ShapeDtypeStruct((1, num_slots), jnp.int32)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(q, cache_k, cache_v, new_k, new_v, slots, at):
        return swa_decode(
            q,
            cache_k,
            cache_v,
            new_k=new_k,
            new_v=new_v,
            q_positions=at,
            cache_positions=slots,
            window=None,
        )

    compiled = jax.jit(step).lower(new, cache, cache, new, new, slots, one).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * num_slots * 2 * 64 * 4


X = np.zeros((2, 3, 4, 8), np.float32)
CACHE = np.zeros((2, 9, 2, 8), np.float32)
WRONG = {
    "cache_k: expected batch 2 and head dim 8 like q": dict(cache_k=CACHE[:1], cache_v=CACHE[:1]),
    "cache_v: expected cache_k's shape": dict(cache_v=CACHE[:, :4]),
    "new_v: expected an array beside new_k, got None": dict(new_k=CACHE[:, :3]),
    "new_k: expected an array beside new_v, got None": dict(new_v=CACHE[:, :3]),
    r"new_k: expected shape \(2, 3, 2, 8\), got \(2, 4, 2, 8\)": dict(
        new_k=CACHE[:, :4], new_v=CACHE[:, :4]
    ),
    r"q_positions: expected shape \[2, 3\], got shape \[2, 2\]": dict(
        q_positions=np.zeros((2, 2), np.int32)
    ),
    r"cache_positions: expected shape \[2, 9\], got": dict(
        cache_positions=np.zeros((2, 3), np.int32)
    ),
    r"q_full: expected bool of shape \[2, 3\], got int32": dict(q_full=np.zeros((2, 3), np.int32)),
    r"cache_k: expected no axis of length 0, got shape \(2, 0, 2, 8\)": dict(
        cache_k=CACHE[:, :0], cache_v=CACHE[:, :0], cache_positions=np.zeros((2, 0), np.int32)
    ),
    "window: expected at least 1, got 0": dict(window=0),
    "backend: expected one of 'auto', 'pallas_gpu', .*, 'xla' for swa_decode": dict(
        backend="cudnn"
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_argument_expected_and_got(message, no_type_checks):
    given = (
        dict(
            q=X,
            cache_k=CACHE,
            cache_v=CACHE,
            q_positions=np.zeros((2, 3), np.int32),
            cache_positions=np.zeros((2, 9), np.int32),
            window=3,
        )
        | WRONG[message]
    )
    arrays = [jnp.asarray(given.pop(name)) for name in ("q", "cache_k", "cache_v")]
    with pytest.raises(ValueError, match=message):
        swa_decode(*arrays, **given)
