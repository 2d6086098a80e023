"""The visibility formula, segments and full rows."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from kernels_pallas import Stage
from kernels_pallas.mask import full_rows, row_info, segment_positions, segment_starts, visible
from tests.support import bruteforce

PROMPT, ANSWER = int(Stage.PROMPT), int(Stage.ANSWER)


def picture(mask):
    return ["".join(".x"[int(x)] for x in row) for row in np.asarray(mask)]


def test_visible_as_drawn():
    i = np.arange(8)
    mask = visible(i[:, None], i, window=4, num_sink_tokens=2, q_full=(i == 7)[:, None])
    assert picture(mask) == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xxxxxx..",
        "xx.xxxx.",
        "xxxxxxxx",
    ]


def test_window_counts_the_query_itself():
    i = np.arange(4)
    assert picture(visible(i[:, None], i, window=1)) == ["x...", ".x..", "..x.", "...x"]


def test_window_none_is_causal():
    i = np.arange(3)
    assert picture(visible(i[:, None], i, window=None)) == ["x..", "xx.", "xxx"]


def test_visible_serves_numpy_and_jnp_alike():
    i = np.arange(9)
    segment = np.repeat([0, 1], [4, 5])
    pos = np.asarray(segment_positions(jnp.asarray(segment[None]))[0])
    windows = np.array([2, 100])[:, None, None]
    sinks = np.array([1, 0])[:, None, None]
    masks = [
        visible(
            xp.asarray(pos)[None, :, None],
            xp.asarray(pos)[None, None],
            window=xp.asarray(windows),
            num_sink_tokens=xp.asarray(sinks),
            q_full=xp.asarray(i == 6)[None, :, None],
            q_segment=xp.asarray(segment)[None, :, None],
            k_segment=xp.asarray(segment)[None, None],
        )
        for xp in (np, jnp)
    ]
    np.testing.assert_array_equal(*masks)
    assert isinstance(masks[0], np.ndarray)
    assert masks[0].shape == (2, 9, 9)


def test_segments_are_runs():
    ids = jnp.array([[4, 4, 7, 4, 4, 4], [0, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(segment_starts(ids), [[0, 0, 2, 3, 3, 3], [0, 0, 0, 0, 0, 5]])
    np.testing.assert_array_equal(segment_positions(ids), [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0]])


def rows_of(stage_ids, *, tail=0, length=None, segment_ids=None, offset=0, num_queries=None):
    num_keys = len(stage_ids)
    return full_rows(
        jnp.asarray([stage_ids]),
        lengths=jnp.asarray([num_keys if length is None else length]),
        segment_ids=None if segment_ids is None else jnp.asarray([segment_ids]),
        q_offset=offset,
        full_attention_tail=tail,
        shape=(1, num_keys if num_queries is None else num_queries, num_keys),
    )


def test_tail_as_drawn():
    stages = [PROMPT] * 4 + [ANSWER] * 2 + [PROMPT] * 6
    segments = [0] * 8 + [1] * 4
    rows = rows_of(stages, tail=2, length=11, segment_ids=segments)
    assert picture(rows) == ["..xxxxxx.xx."]


def test_tail_sees_the_answer_after_its_chunk():
    """Stage ids by key reach beyond the chunk of query rows 2..4."""
    stages = [PROMPT] * 6 + [ANSWER] * 2
    assert picture(rows_of(stages, tail=2, offset=2, num_queries=3)) == ["..x"]


@given(data=st.data())
def test_full_rows_against_loop(data):
    """A window of 1 without sinks shows the full rows: they alone see their segment's start."""
    num_keys = data.draw(st.sampled_from([1, 7, 24]), "S")
    bits = st.lists(st.integers(0, 1), min_size=num_keys, max_size=num_keys)
    stages, segments = data.draw(bits), data.draw(bits)
    length = data.draw(st.integers(0, num_keys))
    tail = data.draw(st.integers(0, 5))
    mask = bruteforce.visible_pairs(
        shape=(1, num_keys, num_keys),
        window=1,
        lengths=[length],
        stage_ids=[stages],
        segment_ids=[segments],
        tail=tail,
    )
    starts = np.asarray(segment_starts(jnp.asarray([segments])))[0]
    rows = np.asarray(rows_of(stages, tail=tail, length=length, segment_ids=segments))[0]
    for i in range(length):
        if starts[i] < i:  # a segment's first row sees its start in any case
            assert rows[i] == mask[0, i, starts[i]]


def test_row_info_without_stages_has_no_full_rows():
    rows = row_info(
        shape=(2, 3, 5),
        lengths=jnp.array([5, 3]),
        stage_ids=None,
        segment_ids=None,
        q_offset=2,
        full_attention_tail=0,
    )
    assert rows.q_full is None
    np.testing.assert_array_equal(rows.q_index, [[2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(rows.q_valid, [[True] * 3, [True, False, False]])
