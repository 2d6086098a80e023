"""What goes to cuDNN, and in which words, which jax.nn's XLA path tries on the CPU."""

import dataclasses
import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas import Target
from kernels_pallas.backends import choose_backend
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.cudnn import compute, keywords_of, limits
from tests.support import bruteforce

T = 24


def arguments(*, dtype="bfloat16", head_dim=16, num_keys=T, **changes):
    rng = np.random.default_rng(0)
    shapes = ((2, T, 4, head_dim), (2, num_keys, 2, head_dim), (2, num_keys, 2, head_dim))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return PrefillArguments(q=q, k=k, v=v, **({"window": None, "scale": 0.2} | changes))


IDS = jnp.zeros((2, T), jnp.int32)
FULL_ROWS = jnp.asarray(np.arange(T) >= np.array([[7], [20]]))
LENGTHS = jnp.array([T, 9], jnp.int32)
EXACT = {
    "full": dict(),
    "full_float16": dict(dtype="float16"),
    "full_lengths": dict(lengths=LENGTHS),
    "full_ignores_full_rows_and_sinks": dict(q_full=FULL_ROWS, num_sink_tokens=5),
    "window": dict(window=5),
    "window_lengths": dict(window=5, lengths=LENGTHS),
    "window_of_one": dict(window=1),
    "sinks": dict(window=5, num_sink_tokens=2),
    "sinks_lengths": dict(window=5, num_sink_tokens=2, lengths=LENGTHS),
    "sinks_beyond_the_window": dict(window=3, num_sink_tokens=9),
    "sinks_beyond_all": dict(window=3, num_sink_tokens=T + 200),
    "full_rows": dict(window=5, q_full=FULL_ROWS),
    "full_rows_sinks_lengths": dict(window=5, num_sink_tokens=2, q_full=FULL_ROWS, lengths=LENGTHS),
    "keys_behind": dict(num_keys=T + 7, lengths=LENGTHS),
    "keys_behind_sinks": dict(num_keys=T + 7, window=5, num_sink_tokens=2),
    "offset": dict(num_keys=T + 7, q_offset=7),
    "offset_window": dict(num_keys=T + 7, q_offset=3, window=5),
    "offsets": dict(num_keys=T + 7, q_offset=jnp.array([0, 6]), lengths=LENGTHS),
    "offsets_sinks": dict(
        num_keys=T + 7, q_offset=jnp.array([0, 6]), window=5, num_sink_tokens=2, q_full=FULL_ROWS
    ),
}
LIMITED = {
    "q: expected bfloat16 or float16, got float32": dict(dtype="float32"),
    "q: expected a head dim of at most 128, in steps of 8, got 12": dict(head_dim=12),
    "window: expected an int, got an array": dict(window=jnp.array([3, 4])),
    "num_sink_tokens: expected an int, got an array": dict(
        window=4, num_sink_tokens=jnp.array([0, 0])
    ),
    "segment_ids: expected None, got an array": dict(segment_ids=IDS),
    "softcap: expected None, got 2.0": dict(softcap=2.0),
    "return_lse: expected False, got True (jax.nn rounds it to q's dtype)": dict(return_lse=True),
}
GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("name", EXACT)
def test_auto_takes_exact_cases_on_a_gpu(name):
    case = arguments(**EXACT[name], target=GPU)
    assert limits(case) == ()
    for choice in ("auto", "cudnn"):
        assert choose_backend("swa_prefill", choice, case) == "cudnn"
    assert choose_backend("swa_prefill", "xla", case) == "xla", "what is named is what runs"


@pytest.mark.parametrize("limit", LIMITED)
def test_limits(limit):
    case = arguments(**LIMITED[limit], target=GPU)
    assert limits(case) == (limit,)
    assert choose_backend("swa_prefill", "auto", case) == "xla"
    with pytest.raises(NotImplementedError, match=f"'cudnn' cannot .*{re.escape(limit)}"):
        choose_backend("swa_prefill", "cudnn", case)


@pytest.mark.parametrize("window", (None, 5))
def test_masks_of_full_rows_are_bounded(window):
    """Queries at an offset to all keys: 2^31 pairs are the most; without full rows any number."""

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    def case(num_keys, **changes):
        keys = array(2, num_keys, 8, 128)
        given = {"window": window, "scale": 0.1, "q_offset": array(2, dtype="int32")} | changes
        return PrefillArguments(q=array(2, 1024, 32, 128), k=keys, v=keys, **given)

    full = {} if window is None else {"q_full": array(2, 1024, dtype="bool")}
    assert limits(case(2**20, **full)) == ()
    assert limits(case(2**20 + 1, **full)) == (
        "q_offset: expected 0, or at most 2147483648 pairs of a query and a key, got 2147485696",
    )
    assert limits(case(2**20 + 1, q_offset=0, **full)) == ()
    if window is not None:
        assert limits(case(2**20 + 1)) == ()


def test_it_runs_on_gpus_alone():
    with pytest.raises(NotImplementedError, match="'cudnn' expects platform 'gpu', got 'cpu'"):
        choose_backend("swa_prefill", "cudnn", arguments())


@pytest.mark.parametrize("name", EXACT)
def test_words_mean_our_mask(name):
    """jax.nn with our keywords equals the loop: window, lengths, zeros, gradients."""
    # float32 here, so that the comparison is tight (a few units of 1.2e-7 on entries of order 1).
    case = arguments(**(EXACT[name] | {"dtype": "float32"}))
    assert_equals_the_loop(poisoned(case))


def poisoned(case):
    """NaN in queries and keys that are padding, and in keys that come after all queries."""
    _, num_queries, num_keys = case.shape
    lengths = np.full(2, num_keys) if case.lengths is None else np.asarray(case.lengths)
    first = np.broadcast_to(case.q_offset, (2,))
    real_q = first[:, None] + np.arange(num_queries) < lengths[:, None]
    end = np.where(real_q.any(1), np.minimum(lengths, first + num_queries), 0)
    real_k = np.arange(num_keys) < end[:, None]
    q, k, v = (
        jnp.where(real[:, :, None, None], x, jnp.nan)
        for real, x in ((real_q, case.q), (real_k, case.k), (real_k, case.v))
    )
    return dataclasses.replace(case, q=q, k=k, v=v)


def assert_equals_the_loop(case):
    mask = bruteforce.visible_pairs(
        shape=case.shape,
        window=case.window,
        sinks=case.num_sink_tokens,
        lengths=case.lengths,
        q_full=case.q_full,
        q_offset=case.q_offset,
    )
    wanted = bruteforce.attend(case.q, case.k, case.v, mask, scale=case.scale)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(case.q.shape), jnp.float32)
    # Arrays are traced, numbers are part of the program.
    arrays = {name: x for name, x in vars(case).items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in vars(case).items() if name not in arrays}
    out, grads = compiled(tuple(static.items()))(arrays, d_out)
    np.testing.assert_allclose(out, wanted.out, atol=1e-5, rtol=0)
    zeros = np.zeros(out.shape[:3])
    wanted = bruteforce.gradients(
        case.q, case.k, case.v, mask, d_out=d_out, d_lse=zeros, scale=case.scale
    )
    for actual, want in zip(grads, wanted, strict=True):
        atol = 1e-5 * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(actual, want, atol=atol, rtol=0)


@functools.cache
def compiled(static):
    """Output and gradients."""

    def run(arrays, d_out):
        def loss(q, k, v):
            changed = PrefillArguments(**dict(static), **(arrays | dict(q=q, k=k, v=v)))
            out = compute(changed, implementation="xla").out
            return jnp.sum(out * d_out), out

        qkv = (arrays[name] for name in "qkv")
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return out, grads

    return jax.jit(run)


@pytest.mark.parametrize("num_keys", (150, 512))
@pytest.mark.parametrize("window, sinks", [(None, 0), (6, 0), (70, 3), (300, 130), (1000, 0)])
@settings(max_examples=8)
@given(data=st.data())
def test_queries_at_any_offset(window, sinks, num_keys, data):
    """70 queries are two chunks of 64; 150 keys are read as 128 or 192, 512 as 128, 256 or 512."""
    offsets = st.lists(
        st.sampled_from([0, 1, 5, 63, 64, 65, num_keys - 70, num_keys - 1]), min_size=2, max_size=2
    )
    offset = np.asarray(data.draw(offsets | st.just([0, 0])), np.int32)
    real = data.draw(st.lists(st.sampled_from([0, 1, 7, 64, 70]), min_size=2, max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 2)))
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, tokens, heads, 8)), jnp.float32)
        for tokens, heads in ((70, 2), (num_keys, 1), (num_keys, 1))
    )
    q_full = data.draw(st.booleans())
    case = dataclasses.replace(
        arguments(window=window, num_sink_tokens=sinks),
        q=q,
        k=k,
        v=v,
        q_offset=jnp.asarray(offset),
        lengths=jnp.asarray(np.minimum(offset + np.array(real), num_keys), jnp.int32),
        q_full=jnp.asarray(rng.random((2, 70)) < 0.3) if q_full else None,
    )
    assert_equals_the_loop(poisoned(case))


def test_one_offset_for_all_rows():
    case = arguments(dtype="float32", num_keys=T + 9, q_offset=jnp.int32(4), window=5)
    assert_equals_the_loop(case)
    assert_equals_the_loop(dataclasses.replace(case, window=None))


@pytest.mark.parametrize("window, sinks", [(100, 3), (65, 130)])
def test_chunks_of_a_longer_row(window, sinks):
    """200 rows are several chunks, and sinks lie before, in and behind a window."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 200, n, 8)), jnp.float32) for n in (2, 1, 1))
    q_full = jnp.asarray(np.arange(200)[None] >= 150)
    case = dataclasses.replace(
        arguments(window=window, num_sink_tokens=sinks), q=q, k=k, v=v, q_full=q_full
    )
    assert_equals_the_loop(case)


def test_keywords():
    assert keywords_of(arguments()) == {"scale": 0.2, "is_causal": True}
    keywords = keywords_of(arguments(window=5, lengths=jnp.array([T + 3, 0])))
    # The left context leaves the query out; the right one must be 0 where lengths are given.
    assert keywords["local_window_size"] == (4, 0)
    np.testing.assert_array_equal(keywords["query_seq_lengths"], [T, 1])
    assert keywords["query_seq_lengths"].dtype == jnp.int32
    assert keywords["key_value_seq_lengths"] is keywords["query_seq_lengths"]
