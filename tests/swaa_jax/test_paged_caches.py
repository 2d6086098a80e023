"""Pages of a pool equal full caches: what is written, read in chunks, and decoded."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax.attention import EMPTY, Caches, FullCache, PagedCache, RingCache, attend_cached
from swaa_jax.policy import LayerAttention
from tests.support.random_models import HF_CONFIG, random_model

PAGE, NUM_PAGES, COLUMNS = 4, 9, 3


@settings(max_examples=60)
@given(
    order=st.permutations(range(NUM_PAGES)),
    starts=st.tuples(*[st.integers(0, PAGE * COLUMNS)] * 3),
    blocks=st.lists(
        st.tuples(st.sampled_from([1, 2, 6]), st.tuples(*[st.integers(0, 6)] * 3)), max_size=4
    ),
)
def test_pages_hold_what_full_caches_hold(order, starts, blocks):
    """Rows of different lengths, padding, and tokens past the last slot, which both drop."""
    table = jnp.asarray(order, jnp.int32).reshape(3, COLUMNS)
    rng = np.random.default_rng(0)
    full = FullCache(**{n: jnp.zeros((3, PAGE * COLUMNS, 2, 3)) for n in "kv"})
    pages = PagedCache(**{n: jnp.zeros((NUM_PAGES, PAGE, 2, 3)) for n in "kv"}, table=table)
    pos_B = jnp.asarray(starts, jnp.int32)
    for size, lengths in blocks:
        k, v = (jnp.asarray(rng.standard_normal((3, size, 2, 3)), jnp.float32) for _ in "kv")
        lengths = jnp.minimum(jnp.asarray(lengths, jnp.int32), size)
        full = full.write(k, v, pos_B, lengths)
        pages = pages.write(k, v, pos_B, lengths)
        pos_B = pos_B + lengths
    np.testing.assert_array_equal(pages.rows().k, full.k)
    np.testing.assert_array_equal(pages.rows().v, full.v)
    np.testing.assert_array_equal(pages.positions(pos_B), full.positions(pos_B))
    assert pages.num_slots == full.num_slots


def test_a_row_of_caches_goes_out_and_comes_back():
    """Rings by row; the pool as the row left it; the other rows' tables as they were."""
    policy = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers="1::2")
    model = random_model(policy, num_hidden_layers=2)
    caches = model.empty_caches(3, cache_size=12, pages=(NUM_PAGES, PAGE))
    assert [type(layer) for layer in caches.layers][1] is PagedCache
    table = jnp.arange(9, dtype=jnp.int32).reshape(3, 3)
    caches = Caches(layers=caches.layers, pos_B=jnp.array([3, 0, 7]), table=table)
    row = caches.take(1)
    np.testing.assert_array_equal(row.table, [[3, 4, 5]])
    read = model.read(jnp.array([[5, 6, 7]]), row).caches
    after = caches.insert(read, 1)
    np.testing.assert_array_equal(after.pos_B, [3, 3, 7])
    np.testing.assert_array_equal(after.table, table)
    assert jax.tree.structure(after) == jax.tree.structure(caches)
    ring, pool = after.layers
    assert isinstance(ring, RingCache) and isinstance(pool, PagedCache)
    np.testing.assert_array_equal(ring.slot_positions[1, :4], [0, 1, 2, EMPTY])
    assert (np.asarray(ring.slot_positions)[[0, 2]] == EMPTY).all()
    written = np.flatnonzero(np.asarray(pool.k).reshape(NUM_PAGES * PAGE, -1).any(axis=1))
    np.testing.assert_array_equal(written, [12, 13, 14])  # page 3
    with pytest.raises(ValueError, match="expected pages with their table, got none"):
        _ = pool.num_slots


POLICIES = {
    "full": swaa.AttentionPolicy(),
    "1::2": swaa.AttentionPolicy(window=6, num_sink_tokens=2, full_attention_layers="1::2"),
    "FA decode": swaa.AttentionPolicy(window=5, num_sink_tokens=2, decode="full"),
    "tail": swaa.AttentionPolicy(window=6, num_sink_tokens=2, full_attention_tail=9),
    "heads": swaa.AttentionPolicy(
        window=7, num_sink_tokens=2, full_attention_heads={0: [1], 2: [0]}
    ),
}


# Of "1::2", half the layers are full.
@pytest.mark.parametrize(
    "policy",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "full")) for name in POLICIES],
)
def test_pages_equal_full_caches_in_a_model(policy):
    """Chunks of 16 and steps of one token; the oracle is the contiguous cache."""
    lengths = np.array([23, 40, 1])
    model = random_model(POLICIES[policy], num_hidden_layers=3)
    prompts = np.random.default_rng(0).integers(0, HF_CONFIG["vocab_size"], (3, 48))
    read, decode = jax.jit(model.read), jax.jit(model.decode)
    empty = functools.partial(model.empty_caches, 3, cache_size=56)
    order = np.random.default_rng(1).permutation(21).astype(np.int32).reshape(3, 7)
    both = [empty(), empty(pages=(21, 8))]
    both[1] = Caches(layers=both[1].layers, pos_B=both[1].pos_B, table=jnp.asarray(order))
    for start in (0, 16, 32):
        piece = jnp.asarray(prompts[:, start : start + 16])
        real = jnp.asarray(np.clip(lengths - start, 0, 16))
        outs = [read(piece, one, lengths=real, prompt_lengths=jnp.asarray(lengths)) for one in both]
        rows = np.asarray(real) > 0
        logits = [np.asarray(out.logits)[rows] for out in outs]
        np.testing.assert_allclose(logits[1], logits[0], rtol=2e-5, atol=2e-5)
        both = [out.caches for out in outs]
    for token in range(5):
        tokens = jnp.asarray(prompts[:, token : token + 1])
        active = jnp.array([1, 0 if token == 2 else 1, 1])
        steps = [decode(tokens, one, lengths=active) for one in both]
        both = [caches for _, caches in steps]
        rows = np.asarray(active) > 0
        got, want = (np.asarray(logits)[rows] for logits, _ in reversed(steps))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(both[1].pos_B - lengths, [5, 4, 5])


@pytest.mark.parametrize("kind", ("pages", "ring"))
def test_decoding_step_by_step_copies_no_cache(kind):
    """A loop of steps writes a cache where it lies; a copy would cost more than what is read."""
    layer = LayerAttention()
    cache = PagedCache(
        **{name: jnp.zeros((NUM_PAGES, 32, 2, 16)) for name in "kv"},
        table=jnp.arange(NUM_PAGES, dtype=jnp.int32).reshape(3, 3),
    )
    if kind == "ring":
        layer = LayerAttention(window=70, num_sink_tokens=3)
        cache = RingCache(
            **{name: jnp.zeros((3, 73, 2, 16)) for name in "kv"},
            slot_positions=jnp.full((3, 73), EMPTY),
            num_sink_tokens=3,
        )

    def steps(cache, x, pos_B):
        def one(number, carry):
            cache, x = carry
            kv = x[:, :, :2]
            out, grown = attend_cached(x, kv, kv, cache, layer=layer, pos_B=pos_B + number)
            return grown, out

        return jax.lax.fori_loop(0, 5, one, (cache, x))

    run = jax.jit(steps, donate_argnums=0)
    lowered = run.lower(cache, jnp.ones((3, 1, 4, 16)), jnp.array([0, 40, 90]))
    text = lowered.compile().as_text()
    of_cache = re.escape("f32[" + ",".join(map(str, cache.k.shape)) + "]")
    assert re.search(of_cache + r"\S* parameter", text)
    assert not re.findall(of_cache + r"\S* copy\(", text)
