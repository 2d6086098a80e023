"""``swa_prefill`` as users call it: static and traced arguments, errors, compile counts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionOutput, swa_prefill
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.xla import Tiling, _reach, choose_tiling, compute
from tests.support import bruteforce

BACKENDS = ("reference", "xla")
# float32, heads of 8, at most 80 keys: a few dozen units in the last place of entries of order 1.
ATOL = 1e-5


@functools.cache
def qkv(num_queries=80, num_keys=80, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((2, num_queries, 4, 8), (2, num_keys, 2, 8), (2, num_keys, 2, 8))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window, sinks", [(1, 0), (7, 130), (64, 3), (500, 0), (None, 4)])
def test_static_window(backend, window, sinks):
    q, k, v = qkv()
    q_full = np.stack([np.arange(80) % 30 > 22, np.zeros(80, bool)])
    lengths = np.array([80, 33], np.int32)
    result = swa_prefill(
        q,
        k,
        v,
        window=window,
        num_sink_tokens=sinks,
        q_full=jnp.asarray(q_full),
        lengths=jnp.asarray(lengths),
        return_lse=True,
        backend=backend,
    )
    mask = bruteforce.visible_pairs(
        shape=(2, 80, 80), window=window, sinks=sinks, lengths=lengths, q_full=q_full
    )
    wanted = bruteforce.attend(q, k, v, mask)
    assert isinstance(result, AttentionOutput)
    np.testing.assert_allclose(result.out, wanted.out, atol=ATOL, rtol=0)
    np.testing.assert_allclose(result.lse, wanted.lse, atol=ATOL, rtol=0)


def test_a_policy_per_row_equals_one_policy_a_call():
    q, k, v = qkv()
    q_full = jnp.asarray(np.stack([np.arange(80) % 40 > 35, np.arange(80) % 40 > 33]))
    together = swa_prefill(
        q,
        k,
        v,
        window=jnp.array([5, 80]),
        num_sink_tokens=jnp.array([3, 0]),
        q_full=q_full,
    )
    for b, (window, sinks) in enumerate([(5, 3), (None, 0)]):
        alone = swa_prefill(
            *(x[b : b + 1] for x in (q, k, v)),
            window=window,
            num_sink_tokens=sinks,
            q_full=q_full[b : b + 1],
        )
        np.testing.assert_allclose(together[b], alone[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_equal_the_whole(backend):
    """Query rows cut in three, each against the keys so far written (the rest is NaN)."""
    q, k, v = qkv()
    keywords = dict(window=9, num_sink_tokens=2, backend=backend)
    whole = swa_prefill(q, k, v, **keywords)
    chunk = jax.jit(lambda q, k, v, offset: swa_prefill(q, k, v, q_offset=offset, **keywords))
    for begin, end in ((0, 30), (30, 60)):
        unwritten = (jnp.arange(80) >= end)[:, None, None]
        so_far = (jnp.where(unwritten, jnp.nan, x) for x in (k, v))
        part = chunk(q[:, begin:end], *so_far, begin)
        np.testing.assert_allclose(part, whole[:, begin:end], atol=ATOL, rtol=0)
    part = swa_prefill(q[:, 60:], k, v, q_offset=60, **keywords)
    np.testing.assert_allclose(part, whole[:, 60:], atol=ATOL, rtol=0)


def test_traced_arguments_compile_once():
    """Full rows, lengths, segments, windows and sinks share one program, with gradients."""
    q, k, v = qkv()
    traces = []

    @jax.jit
    def step(q, k, v, lengths, q_full, segments, window, sinks):
        traces.append(1)

        def loss(q, k, v):
            out = swa_prefill(
                q,
                k,
                v,
                window=window,
                num_sink_tokens=sinks,
                lengths=lengths,
                q_full=q_full,
                segment_ids=segments,
                backend="xla",
            )
            return jnp.sum(out**2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for seed in range(3):
        rng = np.random.default_rng(seed)
        step(
            q,
            k,
            v,
            jnp.asarray(rng.integers(1, 81, 2), jnp.int32),
            jnp.asarray(rng.random((2, 80)) < 0.5),
            jnp.asarray(np.sort(rng.integers(0, 4, (2, 80))), jnp.int32),
            jnp.asarray(rng.integers(1, 90, 2), jnp.int32),
            jnp.asarray(rng.integers(0, 20, 2), jnp.int32),
        )
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_work_follows_the_window():
    """The compiled windowed program holds nothing of size T * S and no buffer beyond O(T)."""
    temps = []
    for length in (2048, 4096):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        attention = jax.jit(lambda q, k, v: swa_prefill(q, k, v, window=64, num_sink_tokens=4))
        temps.append(attention.lower(shape, shape, shape).compile().memory_analysis())
    small, large = (analysis.temp_size_in_bytes for analysis in temps)
    assert large < 2.2 * small
    assert large < 4096 * 4096  # a quarter of one f32 score matrix


@pytest.mark.parametrize("platform", ("cpu", "gpu"))
@pytest.mark.parametrize("window", (1, 64, 500, 512, 2048, 8000, None))
@pytest.mark.parametrize("length", (1, 100, 1024, 16384))
def test_chosen_tiling_reads_a_windowed_block_in_few_chunks(platform, window, length):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    tiling = choose_tiling(arguments(x, x, x, window=window), platform=platform)
    assert isinstance(tiling, Tiling)
    assert tiling.chunk <= (640 if platform == "cpu" else 2048)
    if window is not None:
        # Within a fifth and a block of the keys that the rows of one block can see.
        reach = min(window - 1 + tiling.block_q, length)
        chunks = -(-reach // tiling.chunk)
        assert chunks * tiling.chunk <= 1.2 * reach + 2 * tiling.block_kv


def arguments(q, k, v, **changes):
    return PrefillArguments(q=q, k=k, v=v, **({"window": None, "scale": 1.0} | changes))


@pytest.mark.parametrize("traced", (False, True))
@pytest.mark.parametrize("offset", (0, 3, 4, 9))
@pytest.mark.parametrize("window", (1, 5, 6, 9))
def test_one_chunk_holds_what_a_block_of_rows_reads(window, offset, traced):
    """The smallest chunk for which the loop over chunks is left out, at every alignment."""
    q, k, v = (x[:1] for x in qkv())
    case = arguments(q[:, :24], k, v, window=window, q_offset=offset)
    sizes = dict(block_q=8, block_kv=4)
    if traced:
        case = dataclasses.replace(case, q_offset=jnp.asarray(offset))
    tiling = Tiling(**sizes, chunk_blocks=_reach(case, **sizes))
    result = compute(case, tiling=tiling, platform="cpu")
    mask = bruteforce.visible_pairs(shape=(1, 24, 80), window=window, q_offset=offset)
    wanted = bruteforce.attend(*(case.q, k, v), mask, scale=1.0)
    np.testing.assert_allclose(result.out, wanted.out, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_low_precision_blocks_as_on_an_accelerator(dtype):
    """The CPU computes in float32; the layout and the casts of other platforms are tried here."""
    arrays = qkv(dtype=dtype)
    tiling = Tiling(block_q=16, block_kv=8, chunk_blocks=2)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), dtype)

    def loss(arrays):
        case = arguments(*arrays, window=9, num_sink_tokens=2, scale=0.3)
        result = compute(case, tiling=tiling, platform="gpu")
        return jnp.sum((result.out * d_out).astype(jnp.float32)), result

    grads, result = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    mask = bruteforce.visible_pairs(shape=(2, 80, 80), window=9, sinks=2)
    wanted = bruteforce.attend(*arrays, mask, scale=0.3)
    wanted_grads = bruteforce.gradients(
        *arrays, mask, d_out=d_out, d_lse=np.zeros(d_out.shape[:3]), scale=0.3
    )
    np.testing.assert_allclose(result.lse, wanted.lse, atol=ATOL, rtol=0)
    # Softmax weights (and ds) are rounded to the dtype before they meet the other factor, then the
    # result is: at most a unit of 2^-8 (2^-11) of the largest entry for each of the two, and for
    # the gradients one more, of the cotangent.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for actual, want in zip((result.out, *grads), (wanted.out, *wanted_grads), strict=True):
        assert actual.dtype == dtype
        atol = 3 * unit * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(actual, np.float64), want, atol=atol, rtol=0)


X = np.zeros((2, 6, 4, 8), np.float32)
IDS = np.zeros((2, 6), np.int32)
WRONG = {
    r"q: expected axes \[B, T, N, H\], got shape \(6, 4, 8\)": dict(q=X[0]),
    "q: expected float32, bfloat16 or float16, got int32": dict(q=X.astype(np.int32)),
    "k: expected q's dtype float32, got bfloat16": dict(k=X.astype(jnp.bfloat16)),
    r"v: expected k's shape \(2, 6, 4, 8\), got": dict(v=X[:, :5]),
    "k: expected batch 2 and head dim 8 like q": dict(k=X[:1], v=X[:1]),
    "q: expected a multiple of the 4 KV heads": dict(q=X[:, :, :3]),
    "at least as many keys as queries": dict(k=X[:, :5], v=X[:, :5]),
    "q_offset: expected 0 <= q_offset <= S - T = 0, got 1": dict(q_offset=1),
    r"lengths: expected shape \[2\], got shape \[3\]": dict(lengths=np.zeros(3, np.int32)),
    r"lengths: expected integers of shape \[2\], got the int 4": dict(lengths=4),
    r"lengths: expected integers \(shape \[2\]\), got dtype float32": dict(
        lengths=np.zeros(2, np.float32)
    ),
    r"q_full: expected bool of shape \[2, 6\], got int32 of shape \[2, 6\]": dict(q_full=IDS),
    r"q_full: expected bool of shape \[2, 6\], got bool of shape \[2, 4\]": dict(
        q_full=IDS[:, :4] == 0
    ),
    r"segment_ids: expected shape \[2, 6\], got": dict(segment_ids=IDS[0]),
    r"q: expected no axis of length 0, got shape \(2, 0, 4, 8\)": dict(q=X[:, :0]),
    r"k: expected no axis of length 0, got shape \(2, 6, 0, 8\)": dict(k=X[:, :, :0]),
    "window: expected at least 1, got 0": dict(window=0),
    "window: expected at most 2147483647, got 2147483648": dict(window=2**31),
    r"window: expected integers \(an int or shape \[2\]\), got 2.5": dict(window=2.5),
    "num_sink_tokens: expected at least 0, got -1": dict(num_sink_tokens=-1),
    "num_sink_tokens: expected at most 2147483647, got 1000": dict(num_sink_tokens=10**99),
    "softcap: expected a positive number or None, got 0": dict(softcap=0.0),
    "softcap: expected a positive number or None, got inf": dict(softcap=float("inf")),
    "backend: expected one of 'auto', 'cudnn', 'pallas_gpu', .*, 'xla' for swa_prefill, "
    "got 'gpu'": dict(backend="gpu"),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_argument_expected_and_got(message, no_type_checks):
    given = dict(q=X, k=X, v=X, window=3) | WRONG[message]
    arrays = [jnp.asarray(given.pop(name)) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        swa_prefill(*arrays, **given)


def test_combinations_of_absent_arguments():
    """Every subset of the optional arguments, absent or neutral, gives the same output."""
    q, k, v = (x[:, :24] for x in qkv())
    neutral = {
        "lengths": jnp.full(2, 24, jnp.int32),
        "q_full": jnp.zeros((2, 24), bool),
        "segment_ids": jnp.ones((2, 24), jnp.int32),
        "q_offset": jnp.zeros((), jnp.int32),
    }
    wanted = swa_prefill(q, k, v, window=5, num_sink_tokens=1)
    for count in (1, 4):
        for names in itertools.combinations(neutral, count):
            given = {name: neutral[name] for name in names}
            out = swa_prefill(q, k, v, window=5, num_sink_tokens=1, **given)
            np.testing.assert_allclose(out, wanted, atol=ATOL, rtol=0)
