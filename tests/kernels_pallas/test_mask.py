"""The visibility formula and segments."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.mask import row_info, segment_positions, segment_starts, visible


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


def test_row_info():
    rows = row_info(
        shape=(2, 3, 5), lengths=jnp.array([5, 3]), segment_ids=None, q_offset=2, q_full=None
    )
    np.testing.assert_array_equal(rows.q_index, [[2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(rows.q_valid, [[True] * 3, [True, False, False]])
