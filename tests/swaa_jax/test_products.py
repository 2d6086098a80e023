"""Products of a model's matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Target
from swaa_jax import products


@pytest.mark.parametrize("platform", ("cpu", "gpu"))
@pytest.mark.parametrize("shape", ((1, 1, 8), (8,), (3, 1, 8), (0, 8)))
def test_a_gpu_multiplies_a_single_row_as_two(shape, platform, monkeypatch):
    monkeypatch.setattr(Target, "here", lambda: Target(platform=platform, device_kind=""))
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(each), jnp.float32) for each in (shape, (8, 5)))

    def run(x, matrix):
        return products.product(x, matrix, dtype=jnp.float32)

    two_rows = "f32[2,5]" in str(jax.make_jaxpr(run)(x, matrix))
    assert two_rows == (platform == "gpu" and x.size == 8)
    found, want = run(x, matrix), np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
