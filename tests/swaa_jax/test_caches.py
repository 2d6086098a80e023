"""The ring cache against a list that simply remembers everything."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaa_jax.attention import EMPTY, RingCache, build_cache
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


def of_tokens(row: int, positions) -> np.ndarray:
    """Keys `[n, 2, 3]`, other ones for each row, position, head and entry."""
    at = np.asarray(positions, np.float32)[:, None, None]
    return 1000 * at + 100 * row + 10 * np.arange(2)[:, None] + np.arange(3)


@settings(max_examples=80)
@given(
    shape=st.sampled_from([(1, 0, 0), (4, 2, 0), (3, 5, 2), (8, 0, 3), (5, 1, 8)]),
    starts=st.tuples(*[st.sampled_from([0, 1, 2, 6, 7, 12, 41])] * 3),
    blocks=st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_rows_at_any_position_keep_sinks_and_ring_through_blocks_of_any_length(
    shape, starts, blocks
):
    """Against a dict of position -> key; a block may wrap in its middle or overtake the ring."""
    window, sinks, slack = shape
    num_slots = sinks + window + slack
    held = [{p: of_tokens(row, [p])[0] for p in range(n)} for row, n in enumerate(starts)]
    keys = np.full((3, num_slots, 2, 3), np.nan, np.float32)
    positions = np.full((3, num_slots), EMPTY, np.int32)
    for row, start in enumerate(starts):  # token after token, as decoding fills a ring
        for p in range(start):
            slot = p if p < sinks else sinks + (p - sinks) % (window + slack)
            keys[row, slot], positions[row, slot] = held[row][p], p
    ring = RingCache(
        k=jnp.asarray(keys),
        v=jnp.asarray(-keys),
        slot_positions=jnp.asarray(positions),
        num_sink_tokens=sinks,
    )
    seen = np.array(starts, np.int32)
    for size in blocks:
        block = [np.arange(start, start + size) for start in seen]
        new = np.stack([of_tokens(row, at) for row, at in enumerate(block)])
        ring = ring.write(jnp.asarray(new), -jnp.asarray(new), jnp.asarray(seen))
        for row, at in enumerate(block):
            held[row] |= dict(zip(at.tolist(), new[row], strict=True))
        seen += size
        for row in range(3):
            found = {int(p): s for s, p in enumerate(ring.slot_positions[row]) if p != EMPTY}
            needed = {p for p in held[row] if p < sinks or p >= seen[row] - window - slack}
            assert needed == found.keys()
            assert all(found[p] == p for p in needed if p < sinks), "a sink moved"
            for p, slot in found.items():
                np.testing.assert_array_equal(ring.k[row, slot], held[row][p])
                np.testing.assert_array_equal(ring.v[row, slot], -held[row][p])


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
