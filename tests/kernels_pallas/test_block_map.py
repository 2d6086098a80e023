"""The analytic block map against a loop over blocks and pairs."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas.mask import block_map, row_info
from tests.support import bruteforce

# (B, T, S), block_q, block_kv: equal, coprime, one bigger than the other, bigger than the input.
SHAPES = {
    "equal": ((2, 40, 40), 8, 8),
    "fine_keys": ((2, 37, 37), 16, 4),
    "fine_rows": ((2, 29, 50), 4, 16),
    "coprime": ((2, 35, 61), 6, 5),
    "oversize": ((1, 9, 9), 32, 32),
}


@functools.cache
def compiled(name, is_full):
    shape, block_q, block_kv = SHAPES[name]

    def run(window, sinks, lengths, q_full, segment_ids, q_offset):
        rows = row_info(
            shape=shape,
            lengths=lengths,
            segment_ids=segment_ids,
            q_offset=q_offset,
            q_full=q_full,
        )
        window = None if is_full else window
        return block_map(
            rows, window=window, num_sink_tokens=sinks, block_q=block_q, block_kv=block_kv
        )

    return jax.jit(run)


def drawn_ids(data, shape, most):
    ids = np.zeros(shape, np.int32)
    for b in range(shape[0]):
        for at in data.draw(st.lists(st.integers(0, shape[1] - 1), max_size=4)):
            ids[b, at:] += 1
    return ids % most


@pytest.mark.parametrize("is_full", (False, True), ids=("windowed", "full"))
@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=60)
@given(data=st.data())
def test_sound_and_tight(name, is_full, data):
    shape, block_q, block_kv = SHAPES[name]
    num_batch, num_queries, num_keys = shape

    def ints(strategy):
        return np.asarray([data.draw(strategy) for _ in range(num_batch)], np.int32)

    window = ints(st.sampled_from([1, 2, 5, 8, 17, 200]))
    sinks = ints(st.sampled_from([0, 1, 8, 9, 130]))
    lengths = ints(st.integers(0, num_keys))
    q_full = np.zeros((num_batch, num_queries), bool)
    if data.draw(st.booleans()):
        q_full = drawn_ids(data, (num_batch, num_queries), 2) == 1
    segments = drawn_ids(data, (num_batch, num_keys), 3)
    offset = ints(st.integers(0, num_keys - num_queries))
    arguments = (window, sinks, lengths, q_full, segments, offset)
    blocks = jax.tree.map(np.asarray, compiled(name, is_full)(*map(jnp.asarray, arguments)))
    mask = bruteforce.visible_pairs(
        shape=shape,
        window=None if is_full else window,
        sinks=sinks,
        lengths=lengths,
        q_full=q_full,
        segment_ids=segments,
        q_offset=offset,
    )
    for b in range(num_batch):
        for i in range(-(-num_queries // block_q)):
            check_block(
                jax.tree.map(lambda x, b=b, i=i: int(x[b, i]), blocks),
                mask[b, i * block_q : (i + 1) * block_q],
                block_kv,
            )


def check_block(ranges, mask_rows, block_kv):
    """``ranges``: the map of one query block; ``mask_rows`` [block_q, S]: who sees whom there."""
    num_blocks = -(-mask_rows.shape[1] // block_kv)
    sink = set(range(ranges.sink_first, ranges.sink_end))
    main = set(range(ranges.first, ranges.end))
    free = set(range(ranges.unmasked_first, ranges.unmasked_end))
    assert not sink & main
    assert free <= main
    if sink and main:
        assert max(sink) < min(main)
    valid_rows = mask_rows[mask_rows.any(axis=1)]  # a row that is not padding sees itself
    for j in range(num_blocks):
        seen = valid_rows[:, j * block_kv : (j + 1) * block_kv]
        # Sound and tight at once: a block is listed exactly when somebody sees one of its keys.
        assert (j in sink | main) == bool(seen.any()), (j, ranges)
        if j in free:
            assert seen.shape[1] == block_kv
            assert seen.all()
    assert all(0 <= j < num_blocks for j in sink | main)


def test_unmasked_blocks_are_found():
    """In a plain causal layer all but the diagonal blocks are free: none is masked needlessly."""
    rows = row_info(shape=(1, 64, 64), lengths=None, segment_ids=None, q_offset=0, q_full=None)
    blocks = block_map(rows, window=None, num_sink_tokens=0, block_q=16, block_kv=8)
    np.testing.assert_array_equal(blocks.unmasked_first, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(blocks.unmasked_end, [[0, 2, 4, 6]])
    np.testing.assert_array_equal(blocks.end, [[2, 4, 6, 8]])
    windowed = block_map(rows, window=33, num_sink_tokens=3, block_q=16, block_kv=8)
    # The last block: rows 48..63, lows 16..31, sinks in block 0.
    assert [int(x[0, 3]) for x in (windowed.first, windowed.end)] == [2, 8]
    assert [int(x[0, 3]) for x in (windowed.unmasked_first, windowed.unmasked_end)] == [4, 6]
    assert [int(x[0, 3]) for x in (windowed.sink_first, windowed.sink_end)] == [0, 1]


def test_as_many_sinks_as_an_int_holds():
    """Behind a segment's start no int counts them; all its keys are sinks all the same."""
    ids = jnp.asarray(np.repeat([[0, 1]], 20, axis=1), jnp.int32)
    few, many = (
        compiled("equal", False)(2, sinks, None, None, jnp.tile(ids, (2, 1)), 0)
        for sinks in (40, 2**31 - 1)
    )
    # Rows 32 .. 39 see the keys from 31 on, block 3, besides the sinks from 20 on, block 2.
    assert (int(many.sink_first[0, 4]), int(many.sink_end[0, 4]), int(many.first[0, 4])) == (
        2,
        3,
        3,
    )
    jax.tree.map(np.testing.assert_array_equal, few, many)
