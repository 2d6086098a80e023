"""Full rows of a layer from stages, lengths and segments, against a loop."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from swaa_jax.attention import RowWindows, full_rows, tail_rows
from swaa_jax.policy import LayerAttention, Stage
from tests.support import bruteforce

PROMPT, ANSWER = int(Stage.PROMPT), int(Stage.ANSWER)


def layer_of(tail=0, full_decode=True):
    return LayerAttention(window=1, full_decode=full_decode, full_attention_tail=tail)


def rows_of(stages, *, tail=0, length=None, segment_ids=None, full_decode=True):
    rows = full_rows(
        layer_of(tail, full_decode),
        shape=(1, len(stages)),
        stage_ids=jnp.asarray([stages]),
        lengths=None if length is None else jnp.asarray([length]),
        segment_ids=None if segment_ids is None else jnp.asarray([segment_ids]),
    )
    return "".join(".x"[int(x)] for x in np.asarray(rows)[0, :length])


def test_the_tail_as_drawn():
    stages = [PROMPT] * 4 + [ANSWER] * 2 + [PROMPT] * 6
    segments = [0] * 8 + [1] * 4
    about = {"tail": 2, "length": 11, "segment_ids": segments}
    assert rows_of(stages, **about) == "..xxxxxx.xx"
    assert rows_of(stages, **about, full_decode=False) == "..xx..xx.xx"


def test_a_chunk_takes_its_part_of_the_whole_rows():
    """That rows 4 and 5 are the tail is told by the answer after the chunk of rows 2 to 4."""
    assert rows_of([PROMPT] * 6 + [ANSWER] * 2, tail=2)[2:5] == "..x"


def test_no_row_is_full_where_nothing_says_so():
    stages = jnp.zeros((2, 5), jnp.int32)
    of = {"shape": (2, 5), "lengths": jnp.array([5, 3])}
    assert full_rows(LayerAttention(), stage_ids=stages, **of) is None
    assert full_rows(layer_of(full_decode=False), stage_ids=stages, **of) is None
    assert full_rows(layer_of(), **of) is None
    by_row = RowWindows(window=jnp.array([3, 4]), full_attention_tail=1)
    np.testing.assert_array_equal(
        full_rows(by_row, **of), [[False] * 4 + [True], [False, False, True, False, True]]
    )


@pytest.mark.parametrize("full_decode", (False, True))
@given(data=st.data())
def test_full_rows_against_a_loop(full_decode, data):
    width = data.draw(st.sampled_from([1, 7, 24]), "T")
    bits = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    stages, segments = (np.array([data.draw(bits) for _ in range(2)]) for _ in range(2))
    lengths = np.array([data.draw(st.integers(0, width)) for _ in range(2)])
    tail = data.draw(st.integers(0, 30))
    rows = full_rows(
        layer_of(tail, full_decode),
        shape=stages.shape,
        stage_ids=jnp.asarray(stages),
        lengths=jnp.asarray(lengths),
        segment_ids=jnp.asarray(segments),
    )
    wanted = bruteforce.full_rows(
        stages, lengths=lengths, segment_ids=segments, tail=tail, full_decode=full_decode
    )
    real = np.arange(width) < lengths[:, None]
    found = np.zeros_like(wanted) if rows is None else np.asarray(rows)
    np.testing.assert_array_equal(found[real], wanted[real])


def test_tails_in_numpy_equal_those_in_jax():
    rng = np.random.default_rng(0)
    is_answer, begins = rng.random((2, 3, 40)) < 0.15
    for size in (1, 4, 100):
        ours = tail_rows(is_answer, begins, size=size)
        assert isinstance(ours, np.ndarray)
        theirs = jax.jit(lambda a, b, size=size: tail_rows(a, b, size=size))(is_answer, begins)
        np.testing.assert_array_equal(ours, theirs)
