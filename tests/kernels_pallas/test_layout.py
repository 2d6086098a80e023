"""Running sums and maxima, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.layout import LANES, running_max, running_sum


@pytest.fixture(autouse=True, params=["tpu", "default"])
def computed_as_on(request, monkeypatch):
    """What a TPU computes, and what others do."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *given, **ways: ways[request.param](*given)
    )


@pytest.mark.parametrize("size", [0, 1, LANES - 1, LANES, LANES + 1, LANES**2, LANES**2 + 1])
@pytest.mark.parametrize("batch", [(), (2,), (3, 0), (2, 3)])
def test_running_sums_and_maxima(size, batch):
    x = np.random.default_rng(size).integers(0, 50, size=(*batch, size), dtype=np.int32)
    x[..., size // 2 :] //= 2  # so that the largest is not always far behind
    sums, largest = np.asarray(running_sum(jnp.asarray(x))), np.asarray(running_max(jnp.asarray(x)))
    np.testing.assert_array_equal(sums, np.cumsum(x, axis=-1))
    np.testing.assert_array_equal(largest, np.maximum.accumulate(x, axis=-1))
    assert sums.dtype == largest.dtype == np.int32


def test_what_is_counted_may_be_true_or_false():
    x = np.random.default_rng(0).random((2, 300)) < 0.3
    np.testing.assert_array_equal(running_sum(jnp.asarray(x)), np.cumsum(x, axis=-1))


def test_sums_of_numbers_that_floats_would_round():
    x = np.array([(1 << 24) + 1, 1, -3, 5] * 20, np.int32)
    np.testing.assert_array_equal(running_sum(jnp.asarray(x)), np.cumsum(x))
