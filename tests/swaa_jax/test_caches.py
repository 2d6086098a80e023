"""Caches against lists that simply remember everything, and rings no longer than their rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaa_jax.attention import (
    EMPTY,
    AttentionOptions,
    Caches,
    RingCache,
    attend,
    attend_cached,
    build_cache,
    recast_caches,
)
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
    ring = build_cache(keys, -keys, lengths=jnp.array([length]), layer=layer, cache_size=WIDTH)
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
    cache = build_cache(keys, keys, lengths=jnp.array([2]), layer=LayerAttention(), cache_size=5)
    np.testing.assert_array_equal(cache.positions(jnp.array([2])), [[0, 1, -1, -1, -1]])
    block = jnp.asarray(rows(4, 100))
    cache = cache.write(block, block, jnp.array([2]))
    np.testing.assert_array_equal(cache.k[0, :, 0, 0], [0, 1, 100, 101, 102])


def test_a_cache_smaller_than_the_prompt_is_refused():
    keys = jnp.asarray(rows(4, 0))
    with pytest.raises(ValueError, match=r"cache_size.*at least.*4, got 3"):
        build_cache(keys, keys, lengths=jnp.array([4]), layer=LayerAttention(), cache_size=3)


LAYERS = {
    "full": LayerAttention(),
    "ring": LayerAttention(window=4, num_sink_tokens=2),
    "split": LayerAttention(window=3, num_sink_tokens=1, full_heads=(1,)),
    "split, full decode": LayerAttention(window=3, full_heads=(0,), full_decode=True),
}


def filled(layer, lengths, *, cache_size=16):
    """A cache of rows of these lengths; whatever is padding is NaN."""
    width = max(lengths)
    rows = [of_tokens(row, range(width)) for row in range(len(lengths))]
    padding = np.arange(width) >= np.array(lengths)[:, None]
    k = jnp.asarray(np.where(padding[:, :, None, None], np.nan, np.stack(rows)))
    return build_cache(k, -k, lengths=jnp.array(lengths), layer=layer, cache_size=cache_size)


def visible_part(cache, pos_B):
    """The cache with zeros in slots that hold no token: what they hold means nothing."""
    if hasattr(cache, "full_heads"):
        parts = {name: visible_part(getattr(cache, name), pos_B) for name in ("full", "windowed")}
        return dataclasses.replace(cache, **parts)
    held = (cache.positions(pos_B) != EMPTY)[:, :, None, None]
    return dataclasses.replace(cache, k=jnp.where(held, cache.k, 0), v=jnp.where(held, cache.v, 0))


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15)
@given(
    starts=st.tuples(*[st.integers(1, 9)] * 3),
    blocks=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=2),
)
def test_padding_of_a_block_is_never_written(name, starts, blocks):
    """A block of 6 tokens a row, of which some are real, against a cache built from all of them."""
    layer, seen = LAYERS[name], np.array(starts)
    cache = filled(layer, starts, cache_size=24)
    for sizes in blocks:
        new = np.stack([of_tokens(row, at + np.arange(6)) for row, at in enumerate(seen)])
        padding = np.arange(6) >= np.array(sizes)[:, None]
        new = jnp.asarray(np.where(padding[:, :, None, None], np.nan, new))
        cache = cache.write(new, -new, jnp.asarray(seen), jnp.array(sizes))
        seen = seen + np.array(sizes)
    pos_B = jnp.asarray(seen)
    for leaf in jax.tree.leaves(visible_part(cache, pos_B)):
        assert not np.isnan(leaf).any()
    wanted = filled(layer, tuple(int(x) for x in seen), cache_size=24)
    jax.tree.map(
        np.testing.assert_array_equal, visible_part(cache, pos_B), visible_part(wanted, pos_B)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_taken_out_and_put_in(name):
    layer, lengths = LAYERS[name], (3, 9, 5)
    cache = filled(layer, lengths)
    row = jax.tree.map(lambda x: x + 1, filled(layer, (9, 7)).take(1))
    insert = jax.jit(lambda cache, row, at: cache.insert(row, at))
    for at in range(3):
        grown = insert(cache, row, at)
        for other in range(3):
            wanted = row if other == at else cache.take(other)
            jax.tree.map(np.testing.assert_array_equal, grown.take(jnp.array(other)), wanted)
    assert insert._cache_size() == 1, "which row is traced"
    assert cache.take(0).num_slots == cache.num_slots == row.num_slots
    np.testing.assert_array_equal(cache.take(1).positions(jnp.array([9]))[0, :2], [0, 1])


def test_a_row_of_another_layout_is_refused():
    cache = filled(LAYERS["full"], (3, 5))
    for other in (
        filled(LAYERS["full"], (3, 5)),
        filled(LAYERS["full"], (3,), cache_size=17),
        filled(LAYERS["ring"], (3,), cache_size=16),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(LAYERS["full"], (3,))),
    ):
        with pytest.raises(ValueError, match="row: expected one row of 16 slots"):
            cache.insert(other, 0)


SIZE = 9
# Window and sinks: far beyond the rows, just beyond, as long, shorter; sinks alone beyond them.
CAPPED = {
    f"{window} + {sinks}, full heads {heads}": LayerAttention(
        window=window, num_sink_tokens=sinks, full_heads=heads
    )
    for window, sinks in ((100, 10), (8, 2), (7, 2), (4, 3), (2, 9), (2, 8), (1, 30))
    for heads in ((), (1,))
}


@pytest.mark.parametrize("name", CAPPED)
def test_a_capped_ring_is_exact_up_to_the_cache_size(name):
    """A row for each prompt length, read on token by token, against attention of whole rows."""
    layer = CAPPED[name]
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((SIZE, 2 * SIZE, heads, 4)), jnp.float32)
        for heads in (4, 2, 2)
    )
    prompts = np.arange(1, SIZE + 1)
    cache = build_cache(
        k[:, :SIZE], v[:, :SIZE], lengths=jnp.asarray(prompts), layer=layer, cache_size=SIZE
    )
    ring = cache.windowed if layer.full_heads else cache
    assert isinstance(ring, RingCache)
    assert ring.num_slots == min(SIZE, layer.window + layer.num_sink_tokens)
    wanted = attend(q, k, v, layer=layer, options=AttentionOptions(backend="reference"))
    step = jax.jit(lambda *new, pos_B: attend_cached(*new, layer=layer, pos_B=pos_B))
    rows = np.arange(SIZE)
    for ahead in range(SIZE - 1):
        at = prompts + ahead
        new = (x[rows, at][:, None] for x in (q, k, v))
        out, cache = step(*new, cache, pos_B=jnp.asarray(at))
        within = at < SIZE  # the others have become too long
        # float32; the same terms, summed in another order.
        np.testing.assert_allclose(out[within, 0], wanted[rows, at][within], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAPPED)
def test_a_recast_ring_is_capped_like_one_that_was_built(name):
    layer = CAPPED[name]
    lengths = jnp.array([SIZE, 5, 1])
    k = jnp.asarray(np.stack([of_tokens(row, range(SIZE)) for row in range(3)]))
    full = dataclasses.replace(layer, full_decode=True)
    for size in (None, SIZE):
        shared, own = (
            build_cache(k, -k, lengths=lengths, layer=each, cache_size=size)
            for each in (full, layer)
        )
        recast = recast_caches(Caches(layers=(shared,), pos_B=lengths), (layer,), cache_size=size)
        jax.tree.map(np.testing.assert_array_equal, recast.layers[0], own)
        ring = own.windowed if layer.full_heads else own
        window_and_sinks = layer.window + layer.num_sink_tokens
        assert ring.num_slots == min(window_and_sinks, size or window_and_sinks)
