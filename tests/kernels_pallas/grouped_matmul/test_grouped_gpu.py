"""The kernels on a Hopper GPU against a dense product in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
CASES = {  # (M, D, F), groups, rows of no group, how even groups are, rows of a mean group or None
    "few large groups": ((1000, 256, 192), 7, 100, 1.0, None),
    "many small groups": ((1000, 128, 64), 40, 3, 0.2, None),
    "large tiles, small groups": ((1000, 128, 64), 40, 3, 0.2, 1000),
    "a prompt's": ((4096, 2048, 768), 128, 0, 0.3, 1000),
    "one token's": ((8, 2048, 768), 128, 0, 1.0, None),
    "64 tokens'": ((512, 768, 2048), 128, 5, 1.0, None),
    "odd sizes": ((123, 72, 200), 5, 11, 1.0, None),
    "fewer rows than the copy engine moves": ((3, 64, 64), 2, 1, 1.0, None),
}
# One rounding of the result, of float32 sums.
RTOL = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@jax.jit
def dense(x, w, dy, group_of_row):
    """The product and its gradients, each row by every group's matrix."""
    dot = functools.partial(jnp.dot, precision="highest")

    def add_group(sums, number):
        mine = (group_of_row == number)[:, None]
        rows, cotangents = (jnp.where(mine, a, 0).astype(jnp.float32) for a in (x, dy))
        matrix = w[number].astype(jnp.float32)
        out, dx = sums[0] + dot(rows, matrix), sums[1] + dot(cotangents, matrix.T)
        return (out, dx), dot(rows.T, cotangents)

    sums = (jnp.zeros(dy.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32))
    sums, dw = jax.lax.scan(add_group, sums, jnp.arange(w.shape[0]))
    return *sums, dw


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("case", CASES)
def test_product_and_gradients_are_the_dense_ones(case, dtype):
    (num_rows, inner, outer), num_groups, left, even, rows_per_group = CASES[case]
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(num_rows - left, rng.dirichlet(np.full(num_groups, even)))
    group_of_row = np.concatenate([np.repeat(np.arange(num_groups), sizes), np.full(left, -1)])
    shapes = ((num_rows, inner), (num_groups, inner, outer), (num_rows, outer))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (jax.random.normal(*both).astype(dtype) for both in zip(keys, shapes, strict=True))
    x, dy = (jnp.where((group_of_row < 0)[:, None], jnp.nan, each) for each in (x, dy))

    @jax.jit
    def compute(x, w, dy, sizes):
        def product(x, w):
            return grouped_matmul(x, w, sizes, rows_per_group=rows_per_group, backend="pallas_gpu")

        out, gradient = jax.vjp(product, x, w)
        return out, *gradient(dy)

    given = (x, w, dy, jnp.asarray(sizes, jnp.int32))
    found, want = compute(*given), dense(x, w, dy, jnp.asarray(group_of_row))
    for one, again, other in zip(found, compute(*given), want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, again)
        scale = max(float(jnp.linalg.norm(other)), 1e-9)
        assert float(jnp.linalg.norm(one.astype(jnp.float32) - other)) <= RTOL[dtype] * scale
