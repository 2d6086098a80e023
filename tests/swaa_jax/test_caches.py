"""The ring cache against a list that simply remembers everything."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaa_jax.attention import EMPTY, build_cache
from swaa_jax.policy import LayerAttention

WIDTH = 12


def rows(count: int, start: int) -> np.ndarray:
    """Keys `[1, count, 1, 1]` whose value is the position that they stand for."""
    return (start + np.arange(count, dtype=np.float32))[None, :, None, None]


@settings(max_examples=60)
@given(
    length=st.integers(1, WIDTH),
    shape=st.sampled_from([(1, 0), (3, 0), (4, 2), (5, 1), (2, 7)]),
    blocks=st.lists(st.sampled_from([1, 2, 5, 9]), max_size=4),
)
def test_ring_holds_the_sinks_and_the_last_window(length, shape, blocks):
    window, sinks = shape
    layer = LayerAttention(window=window, num_sink_tokens=sinks)
    keys = jnp.asarray(rows(WIDTH, 0))
    ring = build_cache(keys, -keys, lengths=jnp.array([length]), layer=layer, num_slots=WIDTH)
    seen = length
    for size in blocks:
        block = jnp.asarray(rows(size, seen))
        ring = ring.write(block, -block, jnp.array([seen]))
        seen += size
    positions = np.asarray(ring.positions(jnp.array([seen])))[0]
    held = positions[positions != EMPTY]
    wanted = {p for p in range(seen) if p < sinks or p >= seen - window}
    assert wanted <= set(held.tolist()), "a visible token was lost"
    assert len(held) == len(set(held.tolist())) and all(p < seen for p in held)
    keys, values = np.asarray(ring.k)[0, :, 0, 0], np.asarray(ring.v)[0, :, 0, 0]
    np.testing.assert_array_equal(keys[positions != EMPTY], held)
    np.testing.assert_array_equal(values[positions != EMPTY], -held)
    assert ring.num_slots == window + sinks


def test_full_cache_overwrites_padding_and_drops_what_does_not_fit():
    keys = jnp.asarray(rows(4, 0))
    cache = build_cache(keys, keys, lengths=jnp.array([2]), layer=LayerAttention(), num_slots=5)
    np.testing.assert_array_equal(cache.positions(jnp.array([2])), [[0, 1, -1, -1, -1]])
    block = jnp.asarray(rows(4, 100))
    cache = cache.write(block, block, jnp.array([2]))
    np.testing.assert_array_equal(cache.k[0, :, 0, 0], [0, 1, 100, 101, 102])


def test_a_cache_smaller_than_the_prompt_is_refused():
    keys = jnp.asarray(rows(4, 0))
    with pytest.raises(ValueError, match=r"cache_size.*at least.*4, got 3"):
        build_cache(keys, keys, lengths=jnp.array([4]), layer=LayerAttention(), num_slots=3)
