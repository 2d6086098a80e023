"""The backends of decoding that run on a GPU, against the dense reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import swa_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

B, N, K, H, PAGE, COLUMNS = 3, 16, 4, 128, 32, 20
HELD = np.array([1, 333, PAGE * COLUMNS - 8])


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.mark.parametrize("backend", ("pallas_gpu", "xla"))
@pytest.mark.parametrize("num_new", (1, 5))
@pytest.mark.parametrize("rules", ({"window": None}, {"window": 100, "num_sink_tokens": 5}))
@pytest.mark.parametrize("has_pages", (True, False))
def test_output_equals_the_reference(has_pages, rules, num_new, backend):
    rng, num_slots = np.random.default_rng(0), PAGE * COLUMNS - (0 if has_pages else 3)
    positions = np.where(np.arange(num_slots) < HELD[:, None], np.arange(num_slots), -1)
    table = jnp.asarray(rng.permutation(B * COLUMNS).reshape(B, COLUMNS), jnp.int32)
    rows = [normal(B, num_slots, K, H), 1 + normal(B, num_slots, K, H)]
    rows = [np.where((positions >= 0)[:, :, None, None], x, np.nan) for x in rows]
    if has_pages:
        pools = [np.zeros((B * COLUMNS, PAGE, K, H)) for _ in rows]
        for pool, x in zip(pools, rows, strict=True):
            pool[np.asarray(table)] = x.reshape(B, COLUMNS, PAGE, K, H)
        rows = pools
    new = {"new_k": normal(B, num_new, K, H), "new_v": normal(B, num_new, K, H)}
    floats = {"q": normal(B, num_new, N, H), "cache_k": rows[0], "cache_v": rows[1], **new}
    floats = {name: jnp.asarray(x, jnp.bfloat16) for name, x in floats.items()}
    integers = {
        "q_positions": jnp.asarray(HELD[:, None] + np.arange(num_new), jnp.int32),
        "cache_positions": jnp.asarray(positions, jnp.int32),
        "page_table": table if has_pages else None,
    }

    def run(floats, backend):
        named = dict(floats)
        arrays = [named.pop(name) for name in ("q", "cache_k", "cache_v")]
        return swa_decode(*arrays, **named, **integers, **rules, backend=backend)

    got = np.asarray(jax.jit(run, static_argnums=1)(floats, backend), np.float32)
    exact = {name: x.astype(jnp.float32) for name, x in floats.items()}
    with jax.default_matmul_precision("highest"):
        want = np.asarray(run(exact, "reference"))
    # bf16 has 8 bits: 2**-8 = 4e-3 relative a rounding.
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)
