"""Every backend of the grouped product against a loop over rows: values, gradients, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import available_backends, grouped_matmul, resolve_backend
from kernels_pallas.grouped_matmul import pallas_tpu as megablox
from kernels_pallas.grouped_matmul.arguments import row_tile

# The TPU kernels run interpreted here; tests/kernels_pallas/grouped_matmul/test_moe_flops.py
# compiles them with the real compiler.
RUNS = {
    name: jax.jit(functools.partial(grouped_matmul, backend=name))
    for name in ("reference", "xla", "ragged_dot")
} | {
    "pallas_tpu": jax.jit(lambda x, w, sizes: megablox.grouped_matmul_interpreted(x, w, sizes, 16))
}
CHEAP = [name for name in RUNS if name != "pallas_tpu"]
# M, D, F, E: odd everywhere; more rows than a tile; a group of its own; rows fewer than groups.
SHAPES = [(37, 5, 9, 3), (80, 8, 4, 2), (20, 3, 130, 1), (6, 4, 4, 7)]


def by_rows(x, w, group_sizes):
    """The oracle: one row at a time, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out = np.zeros((x.shape[0], w.shape[2]))
    group_of_row = np.repeat(np.arange(len(group_sizes)), group_sizes)
    for row, group in enumerate(group_of_row):
        out[row] = x[row] @ w[group]
    return out


@st.composite
def problems(draw):
    num_rows, inner, outer, groups = draw(st.sampled_from(SHAPES))
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), min_size=groups, max_size=groups)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.normal(size=(num_rows, inner)).astype(np.float32)
    x[cuts[-1] :] = np.nan  # rows of no group may hold anything
    w = rng.normal(size=(groups, inner, outer)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), np.diff([0, *cuts]).astype(np.int32)


def check(name, problem):
    x, w, sizes = problem
    out = RUNS[name](x, w, jnp.asarray(sizes))
    # float32 sums of D products of order 1: some tens of units of 1.2e-7 of their size, sqrt(D).
    atol = 3e-6 * np.sqrt(x.shape[1])
    np.testing.assert_allclose(out, by_rows(x, w, sizes), rtol=0, atol=atol)


@pytest.mark.parametrize("name", CHEAP)
@given(problem=problems())
def test_values(name, problem):
    check(name, problem)


@given(problem=problems())
@settings(max_examples=8)  # interpretation is slow
def test_values_of_the_tpu_kernel(problem):
    check("pallas_tpu", problem)


@pytest.mark.parametrize("name", RUNS)
def test_gradients_equal_those_of_a_dense_product(name):
    rng = np.random.default_rng(0)
    sizes = np.array([7, 0, 21, 5], np.int32)
    x = jnp.asarray(rng.normal(size=(40, 6)).astype(np.float32)).at[33:].set(jnp.nan)
    w = jnp.asarray(rng.normal(size=(4, 6, 10)).astype(np.float32))
    weight = jnp.asarray(rng.normal(size=(40, 10)).astype(np.float32))
    group_of_row = np.repeat(np.arange(4), sizes)

    def dense(x, w):
        return jnp.sum(weight[:33] * jnp.einsum("md,mdf->mf", x[:33], w[group_of_row]) ** 2)

    def grouped(x, w):
        return jnp.sum(weight * RUNS[name](x, w, jnp.asarray(sizes)) ** 2)

    want = jax.grad(dense, argnums=(0, 1))(x, w)
    got = jax.jit(jax.grad(grouped, argnums=(0, 1)))(x, w)
    for ours, theirs in zip(got, want, strict=True):
        # float32; gradients of order 100.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    assert np.all(np.asarray(got[0])[33:] == 0), "rows of no group have no gradient"
    assert np.all(np.asarray(got[1])[1] == 0), "nor has the matrix of an empty group"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(name, dtype):
    if name == "pallas_tpu" and dtype == jnp.float16:
        pytest.skip("cast to float32 before the kernel")
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(48, 300)), dtype)
    w = jnp.asarray(rng.normal(size=(2, 300, 7)), dtype)
    sizes = np.array([30, 18], np.int32)
    out = RUNS[name](x, w, jnp.asarray(sizes))
    assert out.dtype == dtype
    want = by_rows(x, w, sizes)
    # One rounding of the result: half a unit in the last place.
    np.testing.assert_allclose(
        np.asarray(out, np.float32), want, rtol=float(jnp.finfo(dtype).eps), atol=1e-3
    )


def test_the_tpu_kernel_over_several_tiles(monkeypatch):
    """Small blocks, so that rows, columns and the sum are all cut, with remainders."""
    monkeypatch.setattr(megablox, "_BLOCK_BYTES", 4 * 128 * 128)
    num_rows, inner, outer, groups = 256, 200, 300, 3
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(num_rows, inner)).astype(np.float32))
    w = jnp.asarray(rng.normal(size=(groups, inner, outer)).astype(np.float32))
    sizes = np.full(groups, num_rows // groups, np.int32)
    sizes[0] -= 5
    check("pallas_tpu", (x, w, sizes))
    grad = jax.grad(lambda x, w: jnp.sum(RUNS["pallas_tpu"](x, w, jnp.asarray(sizes)) ** 2), (0, 1))
    want = jax.grad(lambda x, w: jnp.sum(RUNS["reference"](x, w, jnp.asarray(sizes)) ** 2), (0, 1))
    for ours, theirs in zip(grad(x, w), want(x, w), strict=True):
        # float32 sums of hundreds of products: relative to the largest.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("tokens", [4096, 8192, 32768])
def test_tiles_keep_the_waste_below_a_sixth_and_fit_the_vmem(tokens):
    """Qwen3-30B-A3B: 128 experts, 8 a token."""
    tile = row_tile(tokens * 8 // 128, largest=256)
    assert 128 * tile <= tokens * 8 / 6
    for inner, outer in ((2048, 768), (768, 2048), (2048, 192), (4096, 1536)):
        tile_k, tile_n = megablox.forward_blocks(inner, outer, itemsize=2)
        assert tile_k == inner, "else a group's matrix is read once a tile of rows"
        assert outer % tile_n == 0
        assert 2 * tile_k * tile_n <= 4 << 20


def test_auto_takes_the_platforms_kernel_and_never_ragged_dot():
    assert available_backends("grouped_matmul") == (
        "pallas_gpu",
        "pallas_tpu",
        "ragged_dot",
        "reference",
        "xla",
    )
    chosen = {
        platform: resolve_backend(op="grouped_matmul", platform=platform)
        for platform in ("cpu", "gpu", "tpu", None)
    }
    assert chosen == {"cpu": "xla", "gpu": "pallas_gpu", "tpu": "pallas_tpu", None: "xla"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.ones((4, 3, 1))}, r"x: expected axes \[M, D\], got shape \(4, 3, 1\)"),
        ({"x": jnp.ones((4, 3), jnp.int32)}, "x: expected float32, bfloat16 or float16, got int32"),
        ({"w": jnp.ones((2, 3, 5), jnp.bfloat16)}, "w: expected x's dtype float32, got bfloat16"),
        ({"w": jnp.ones((2, 4, 5))}, "w: expected D = 3 like x"),
        (
            {"w": jnp.ones((0, 3, 5)), "group_sizes": jnp.ones((0,), jnp.int32)},
            r"w: expected at least one group, got shape \(0, 3, 5\)",
        ),
        ({"rows_per_group": -1}, "rows_per_group: expected at least 0, got -1"),
        (
            {"group_sizes": jnp.ones((3,), jnp.int32)},
            r"group_sizes: expected shape \[2\], got shape \[3\]",
        ),
        (
            {"group_sizes": jnp.ones((2,))},
            r"group_sizes: expected integers \(shape \[2\]\), got dtype float32",
        ),
        ({"backend": "cuda"}, "'ragged_dot', 'reference', 'xla' for grouped_matmul, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message, no_type_checks):
    arguments = {
        "x": jnp.ones((4, 3)),
        "w": jnp.ones((2, 3, 5)),
        "group_sizes": jnp.array([1, 2]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(
            arguments.pop("x"), arguments.pop("w"), arguments.pop("group_sizes"), **arguments
        )
