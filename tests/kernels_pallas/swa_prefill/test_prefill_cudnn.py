"""What goes to cuDNN, and in which words, which jax.nn's XLA path tries on the CPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    "q_offset: expected 0, got another one or an array": dict(q_offset=jnp.zeros((), jnp.int32)),
    "k: expected as many keys as queries, 24, got 25": dict(num_keys=T + 1),
    "return_lse: expected False, got True (jax.nn rounds it to q's dtype)": dict(return_lse=True),
}
GPU = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")


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
    chosen = choose_backend("swa_prefill", "auto", case)
    assert chosen == ("pallas_triton" if "q_offset" in LIMITED[limit] else "xla")
    with pytest.raises(NotImplementedError, match=f"'cudnn' cannot .*{re.escape(limit)}"):
        choose_backend("swa_prefill", "cudnn", case)


def test_it_runs_on_gpus_alone():
    with pytest.raises(NotImplementedError, match="'cudnn' expects platform 'gpu', got 'cpu'"):
        choose_backend("swa_prefill", "cudnn", arguments())


@pytest.mark.parametrize("name", EXACT)
def test_words_mean_our_mask(name):
    """jax.nn with our keywords equals the loop: window, lengths, zeros, gradients."""
    # float32 here, so that the comparison is tight (a few units of 1.2e-7 on entries of order 1).
    case = arguments(**(EXACT[name] | {"dtype": "float32"}))
    if case.lengths is not None:  # padding may hold anything
        padding = (jnp.arange(T) >= case.lengths[:, None])[:, :, None, None]
        case = PrefillArguments(
            **(
                vars(case)
                | {n: jnp.where(padding, jnp.nan, getattr(case, n)) for n in ("q", "k", "v")}
            )
        )
    assert_equals_the_loop(case)


def assert_equals_the_loop(case):
    mask = bruteforce.visible_pairs(
        shape=case.shape,
        window=case.window,
        sinks=case.num_sink_tokens,
        lengths=case.lengths,
        q_full=case.q_full,
    )
    wanted = bruteforce.attend(case.q, case.k, case.v, mask, scale=case.scale)
    out = compute(case, implementation="xla").out
    np.testing.assert_allclose(out, wanted.out, atol=1e-5, rtol=0)

    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), jnp.float32)

    def loss(q, k, v):
        changed = PrefillArguments(**(vars(case) | dict(q=q, k=k, v=v)))
        return jnp.sum(compute(changed, implementation="xla").out * d_out)

    grads = jax.grad(loss, (0, 1, 2))(case.q, case.k, case.v)
    zeros = np.zeros(out.shape[:3])
    wanted = bruteforce.gradients(
        case.q, case.k, case.v, mask, d_out=d_out, d_lse=zeros, scale=case.scale
    )
    for actual, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(actual, want, atol=1e-5 * np.abs(want).max(), rtol=0)


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
