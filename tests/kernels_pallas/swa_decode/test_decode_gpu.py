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
HELD = np.array([1, 333, PAGE * COLUMNS - 20])
RULES = ({"window": None}, {"window": 100, "num_sink_tokens": 5})


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.mark.parametrize("backend", ("pallas_gpu", "pallas_triton", "xla"))
@pytest.mark.parametrize("num_new", (1, 5))
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("has_pages", (True, False))
def test_output_equals_the_reference(has_pages, rules, num_new, backend):
    assert_equals_the_reference(backend, num_new=num_new, has_pages=has_pages, **rules)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("heads", ((1, 1), (6, 2), (8, 1)))
@pytest.mark.parametrize("head_dim", (32, 64, 80, 96, 256))
def test_every_head_dim_and_group(head_dim, heads, dtype):
    assert_equals_the_reference(
        "pallas_gpu", head_dim=head_dim, heads=heads, dtype=dtype, num_new=8, **RULES[1]
    )


@pytest.mark.parametrize(
    "rules",
    (
        {"window": None, "softcap": 2.0},
        {"window": jnp.array([1, 70, 900]), "num_sink_tokens": jnp.array([3, 0, 150])},
        {"window": 40, "q_full": jnp.arange(16)[None] % 2 == jnp.array([[0], [1], [1]])},
    ),
)
@pytest.mark.parametrize("has_pages", (True, False))
def test_every_rule_for_16_new_tokens(rules, has_pages):
    assert_equals_the_reference("pallas_gpu", num_new=16, has_pages=has_pages, **rules)


def test_a_ring_that_has_come_round():
    """Its slots are no multiple of anything, its tokens in no order, the new one among them."""
    assert_equals_the_reference("pallas_gpu", is_ring=True, window=500, num_sink_tokens=9)


def assert_equals_the_reference(
    backend,
    *,
    num_new=1,
    has_pages=False,
    is_ring=False,
    head_dim=H,
    heads=(N, K),
    dtype="bfloat16",
    **rules,
):
    rng, num_slots = np.random.default_rng(0), PAGE * COLUMNS - (0 if has_pages else 3)
    positions = np.where(np.arange(num_slots) < HELD[:, None], np.arange(num_slots), -1)
    table = jnp.asarray(rng.permutation(B * COLUMNS).reshape(B, COLUMNS), jnp.int32)
    many, few = heads
    rows = [normal(B, num_slots, few, head_dim), 1 + normal(B, num_slots, few, head_dim)]
    rows = [np.where((positions >= 0)[:, :, None, None], x, np.nan) for x in rows]
    if has_pages:
        pools = [np.zeros((B * COLUMNS, PAGE, few, head_dim)) for _ in rows]
        for pool, x in zip(pools, rows, strict=True):
            pool[np.asarray(table)] = x.reshape(B, COLUMNS, PAGE, few, head_dim)
        rows = pools
    if is_ring:
        order = rng.permutation(num_slots)
        positions, rows = positions[:, order], [x[:, order] for x in rows]
    new = [normal(B, num_new, few, head_dim) for _ in "kv"]
    floats = {"q": normal(B, num_new, many, head_dim), "cache_k": rows[0], "cache_v": rows[1]}
    if not is_ring:
        floats |= {"new_k": new[0], "new_v": new[1]}
    floats = {name: jnp.asarray(x, dtype) for name, x in floats.items()}
    first = HELD[:, None] - (1 if is_ring else 0)
    integers = {
        "q_positions": jnp.asarray(first + np.arange(num_new), jnp.int32),
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
