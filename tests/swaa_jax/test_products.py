"""Products of a model's matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Target
from swaa_jax.products import products

GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
CPU = Target(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize("shape, target, at_once", [
    ((1, 1, 8), GPU, True),
    ((8,), GPU, True),
    ((1, 1, 8), CPU, False),
    ((1, 1, 8), None, False),
    ((2, 1, 8), GPU, False),
])  # fmt: skip
def test_several_matrices_are_multiplied_by_one_row_at_once_on_a_gpu(shape, target, at_once):
    rng = np.random.default_rng(0)
    x, *matrices = (
        jnp.asarray(rng.standard_normal(each), jnp.float32)
        for each in (shape, (8, 5), (8, 3), (8, 7))
    )

    def run(x, *matrices):
        return products(x, matrices, target=target)

    assert str(jax.make_jaxpr(run)(x, *matrices)).count("dot_general") == (1 if at_once else 3)
    for found, matrix in zip(run(x, *matrices), matrices, strict=True):
        want = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
