"""Every prefill backend against the loop in tests.support.bruteforce: output, LSE, gradients.

Shapes and tilings are static and few (each compiles once); windows, sinks, full rows, lengths,
segments and offsets are traced and drawn by Hypothesis. A new backend joins by a line in
``BACKENDS``.
"""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas.backends import load_backend
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.pallas_tpu_tiles import Tiles
from kernels_pallas.swa_prefill.xla import Tiling
from tests.support import bruteforce

BACKENDS = ("reference", "xla", "pallas_tpu")

# Relative to the largest entry. float32: products over 16 dims at highest precision and sums over
# at most 70 keys, all of order 1, lose a few dozen units in the last place (1.2e-7). The 16-bit
# types: the arithmetic is float32 and only the result is rounded, by half a unit in the last place
# (2^-9, 2^-12 relative); the cotangent of the output is rounded once too, hence the doubling.
RTOL = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# The TPU kernels multiply bfloat16 by bfloat16, here as there: the softmax weights and ds are
# rounded too before they meet their other factor, and the gradients start from the rounded output.
# With the rounding of the result that is a unit of 2^-8 for each of the three.
RTOL_ROUNDED_WEIGHTS = {"float32": 1e-5, "bfloat16": 3 * 2.0**-8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Static part of a test."""

    shape: tuple[int, int, int]  # B, T, S
    heads: tuple[int, int, int] = (4, 2, 16)  # N, K, H
    tiling: Tiling | None = None
    dtype: str = "float32"
    softcap: float | None = None
    scale: float | None = None
    full_layer: bool = False
    full_rows: bool = True
    segments: bool = True
    kv_heads: int = 1  # of a step of the TPU kernels


def tiles(block_q, block_kv, chunk_blocks):
    return Tiling(block_q=block_q, block_kv=block_kv, chunk_blocks=chunk_blocks)


CASES = {
    "everything": Case(shape=(2, 48, 48), tiling=tiles(8, 4, 3), kv_heads=2),
    "ragged_tiles": Case(shape=(2, 37, 70), heads=(4, 1, 8), tiling=tiles(16, 8, 1), softcap=1.5),
    "block_q_not_multiple": Case(shape=(2, 41, 41), tiling=tiles(12, 8, 2), segments=False),
    "chunk": Case(shape=(2, 21, 64), tiling=tiles(8, 8, 2), scale=0.7),
    "full_layer": Case(
        shape=(2, 45, 45), heads=(2, 2, 16), tiling=tiles(8, 8, 2), full_layer=True, full_rows=False
    ),
    "one_block": Case(shape=(1, 19, 23), tiling=tiles(64, 64, 1), heads=(6, 2, 8)),
    "default_tiling": Case(shape=(1, 67, 67), full_rows=False, segments=False),
    "bfloat16": Case(shape=(1, 40, 40), tiling=tiles(16, 8, 2), dtype="bfloat16"),
}
# Every head dim, each with another number of query heads to a KV head, in both dtypes.
HEAD_DIMS = {
    f"{dtype}_{heads[2]}": Case(
        shape=(1, 24, 24),
        heads=heads,
        tiling=tiles(8, 8, 2),
        dtype=dtype,
        segments=False,
        kv_heads=heads[1],
    )
    for heads in ((1, 1, 64), (2, 1, 80), (6, 2, 96), (8, 2, 128), (4, 1, 256))
    for dtype in ("float32", "bfloat16")
}


def arguments_of(case, arrays, drawn):
    q, k, v = arrays
    return PrefillArguments(
        q=q,
        k=k,
        v=v,
        window=None if case.full_layer else drawn["window"],
        num_sink_tokens=drawn["sinks"],
        q_full=drawn.get("q_full"),
        lengths=drawn["lengths"],
        segment_ids=drawn.get("segment_ids"),
        q_offset=drawn["q_offset"],
        scale=case.heads[2] ** -0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        return_lse=True,
    )


def keywords_of(case: Case, backend: str):
    """The case's block sizes, and interpretation for what needs a TPU."""
    tiling = case.tiling
    if backend == "xla" and tiling:
        return {"tiling": tiling}
    if backend == "pallas_tpu":
        tiles = None
        if tiling:  # chunks of one head, here of half a head
            chunk = tiling.block_q // (2 if tiling.chunk_blocks == 3 else 1)
            tiles = Tiles(
                block_q=tiling.block_q,
                block_kv=tiling.block_kv,
                chunk=chunk,
                kv_heads=case.kv_heads,
            )
        return {"tiles": tiles, "interpret": True}
    return {}


@functools.cache
def compiled(case: Case, backend: str):
    """One jitted function a case and backend: result and gradients."""
    keywords = keywords_of(case, backend)

    def run(arrays, cotangents, drawn):
        def loss(arrays):
            arguments = arguments_of(case, arrays, drawn)
            result = load_backend("swa_prefill", backend).compute(arguments, **keywords)
            lse = jnp.where(jnp.isfinite(result.lse), result.lse, 0)
            d_out, d_lse = cotangents
            return jnp.sum(result.out.astype(jnp.float32) * d_out) + jnp.sum(lse * d_lse), result

        (_, result), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        return result, grads

    return jax.jit(run)


@functools.cache
def arrays_of(case: Case, seed: int):
    """q, k, v in the case's dtype and float32 cotangents that the dtype holds exactly."""
    rng = np.random.default_rng(seed)
    (num_batch, num_queries, num_keys), (num_heads, num_kv_heads, head_dim) = case.shape, case.heads

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    q = draw(num_batch, num_queries, num_heads, head_dim)
    k = draw(num_batch, num_keys, num_kv_heads, head_dim)
    v = draw(num_batch, num_keys, num_kv_heads, head_dim)
    d_out = draw(*q.shape).astype(jnp.float32)
    d_lse = draw(*q.shape[:3]).astype(jnp.float32)
    return (q, k, v), (d_out, d_lse)


@st.composite
def spans(draw, num_batch, length):
    """0, 1, 2, ... along each row, counting up at a few drawn places; often one span only."""
    rows = np.zeros((num_batch, length), np.int32)
    for b in range(num_batch):
        flips = draw(st.just([]) | st.lists(st.integers(0, length), min_size=1, max_size=5))
        for at in flips:
            rows[b, at:] += 1
    return rows


@st.composite
def drawn_values(draw, case: Case):
    num_batch, num_queries, num_keys = case.shape
    per_row = functools.partial(st.lists, min_size=num_batch, max_size=num_batch)

    def ints(strategy):
        return np.asarray(draw(per_row(strategy)), np.int32)

    drawn = {
        "window": ints(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 40, 200])),
        "sinks": ints(st.sampled_from([0, 1, 4, 10, 130])),
        "lengths": ints(st.sampled_from([num_keys, 0, 1]) | st.integers(1, num_keys)),
        "q_offset": ints(st.integers(0, num_keys - num_queries)),
    }
    if case.full_rows:
        drawn["q_full"] = draw(spans(num_batch, num_queries)) % 2 == 1
    if case.segments:
        # An id may come back: two runs of one id are two segments.
        drawn["segment_ids"] = draw(spans(num_batch, num_keys)) % 3
    return drawn


def expected(case, arrays, cotangents, drawn):
    mask = bruteforce.visible_pairs(
        shape=case.shape,
        window=None if case.full_layer else drawn["window"],
        sinks=drawn["sinks"],
        lengths=drawn["lengths"],
        q_full=drawn.get("q_full"),
        segment_ids=drawn.get("segment_ids"),
        q_offset=drawn["q_offset"],
    )
    scaling = {"scale": case.scale, "softcap": case.softcap}
    result = bruteforce.attend(*arrays, mask, **scaling)
    d_out, d_lse = cotangents
    grads = bruteforce.gradients(*arrays, mask, d_out=d_out, d_lse=d_lse, **scaling)
    return result, grads


def assert_close(actual, wanted, rtol, name):
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all(), f"{name} is not finite"
    room = rtol * max(1.0, np.abs(wanted).max(initial=0.0))
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=room, err_msg=name)


def check(case, backend, drawn, arrays, cotangents):
    result, grads = compiled(case, backend)(arrays, cotangents, drawn)
    wanted, wanted_grads = expected(case, arrays, cotangents, drawn)
    assert result.out.dtype == arrays[0].dtype
    assert result.lse.dtype == jnp.float32
    padding = np.isneginf(wanted.lse)
    np.testing.assert_array_equal(np.isneginf(result.lse), padding)
    assert not np.asarray(result.out, np.float32)[padding].any()
    rtol = (RTOL_ROUNDED_WEIGHTS if backend == "pallas_tpu" else RTOL)[case.dtype]
    assert_close(result.out, wanted.out, rtol, "out")
    # The LSE is float32 whatever the inputs are.
    lse, wanted_lse = (np.where(padding, 0, x) for x in (result.lse, wanted.lse))
    assert_close(lse, wanted_lse, RTOL["float32"], "lse")
    for name, actual, want in zip(("dq", "dk", "dv"), grads, wanted_grads, strict=True):
        assert actual.dtype == arrays[0].dtype
        assert_close(actual, want, rtol, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_against_loop(name, backend, data):
    case = CASES[name]
    drawn = data.draw(drawn_values(case))
    check(case, backend, drawn, *arrays_of(case, seed=data.draw(st.integers(0, 2))))


# The kernel is interpreted: a dtype for each head dim at which tiles differ; both dtypes at 64.
SLOW_DIMS = ("float32_96", "bfloat16_128")


@pytest.mark.parametrize(
    "name, backend",
    [
        pytest.param(
            name,
            backend,
            marks=[pytest.mark.slow] if backend == "pallas_tpu" and name in SLOW_DIMS else [],
        )
        for name in HEAD_DIMS
        for backend in BACKENDS
    ],
)
@settings(max_examples=4)
@given(data=st.data())
def test_head_dims(name, backend, data):
    case = HEAD_DIMS[name]
    check(case, backend, data.draw(drawn_values(case)), *arrays_of(case, seed=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_nan(backend):
    """NaN in padding rows and keys reaches neither the output nor any gradient."""
    case = CASES["everything"]
    arrays, cotangents = arrays_of(case, seed=0)
    lengths = np.array([20, 0], np.int32)
    padding = np.arange(48) >= lengths[:, None]
    poisoned = tuple(jnp.where(padding[:, :, None, None], jnp.nan, x) for x in arrays)
    num_batch = 2
    drawn = {
        "window": np.full(num_batch, 5, np.int32),
        "sinks": np.full(num_batch, 2, np.int32),
        "lengths": lengths,
        "q_offset": np.zeros(num_batch, np.int32),
        "q_full": np.zeros((num_batch, 48), bool),
        "segment_ids": np.zeros((num_batch, 48), np.int32),
    }
    check(case, backend, drawn, poisoned, cotangents)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_not_yet_written_may_hold_nan(backend):
    """A chunk of a longer sequence: keys after its last row are never seen."""
    case = CASES["chunk"]
    arrays, cotangents = arrays_of(case, seed=1)
    offset = np.array([0, 17], np.int32)
    unwritten = np.arange(64) >= offset[:, None] + 21
    q, *kv = arrays
    kv = (jnp.where(unwritten[:, :, None, None], jnp.nan, x) for x in kv)
    drawn = {
        "window": np.array([3, 30], np.int32),
        "sinks": np.array([2, 0], np.int32),
        "lengths": np.array([64, 64], np.int32),
        "q_offset": offset,
        "q_full": np.tile(np.arange(21) % 9 == 8, (2, 1)),
        "segment_ids": np.zeros((2, 64), np.int32),
    }
    check(case, backend, drawn, (q, *kv), cotangents)


def test_oracle_gradients_against_finite_differences():
    """The formula in tests.support.bruteforce.gradients, by central differences in float64."""
    rng = np.random.default_rng(0)
    shape = (1, 5, 6)
    q, k, v = (rng.standard_normal((1, n, heads, 3)) for n, heads in ((5, 4), (6, 2), (6, 2)))
    mask = bruteforce.visible_pairs(shape=shape, window=2, sinks=1, q_offset=1, lengths=[5])
    d_out, d_lse = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:3])

    def loss(*arrays):
        result = bruteforce.attend(*arrays, mask, softcap=1.3)
        return np.sum(result.out * d_out) + np.sum(
            np.where(mask.any(2)[..., None], result.lse, 0) * d_lse
        )

    grads = bruteforce.gradients(q, k, v, mask, d_out=d_out, d_lse=d_lse, softcap=1.3)
    step = 1e-5  # error of order step^2 = 1e-10, rounding 1e-16 / step = 1e-11
    for which, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):
            values = []
            for sign in (1, -1):
                arrays = [q.copy(), k.copy(), v.copy()]
                arrays[which][index] += sign * step
                values.append(loss(*arrays))
            np.testing.assert_allclose((values[0] - values[1]) / (2 * step), grad[index], atol=1e-8)
