"""Pairs of query and key that the operations of a step are counted from."""

import numpy as np
import pytest

from swaa_jax.costs import visible_keys
from swaa_jax.policy import LayerAttention
from tests.support import bruteforce


def test_the_tail_of_a_prompt_sees_everything():
    layer = LayerAttention(window=2, full_attention_tail=3)
    seen = visible_keys(layer, np.arange(6), np.zeros(6, bool))
    assert seen.tolist() == [1, 2, 2, 4, 5, 6]


@pytest.mark.parametrize("full_decode", (False, True))
@pytest.mark.parametrize("tail", (0, 1, 3, 40))
def test_packed_rows_are_counted_as_the_mask_has_them(tail, full_decode):
    lengths = (  # of runs of PROMPT and ANSWER tokens, in turn, of each sample in a row
        ((5, 3), (4, 2, 3, 1)),
        ((9,), (1, 1), (2, 4)),
        ((17, 3),),
        ((0, 4), (6,), (3, 1)),
    )
    shape = (len(lengths), 20)
    positions, segments = np.zeros(shape, int), np.full(shape, -1)
    answer = np.zeros(shape, bool)
    for row, samples in enumerate(lengths):
        at = 0
        for number, runs in enumerate(samples):
            end = at + sum(runs)
            positions[row, at:end] = np.arange(end - at)
            segments[row, at:end] = number
            for turn, size in enumerate(runs):
                answer[row, at : at + size] = turn % 2 == 1
                at += size
    layer = LayerAttention(
        window=2, num_sink_tokens=1, full_decode=full_decode, full_attention_tail=tail
    )
    wanted = bruteforce.visible_pairs(
        shape=(*shape, shape[1]),
        window=2,
        sinks=1,
        q_full=bruteforce.full_rows(
            answer.astype(int), segment_ids=segments, tail=tail, full_decode=full_decode
        ),
        segment_ids=segments,
    ).sum(-1)
    used = segments >= 0
    assert visible_keys(layer, positions, answer)[used].tolist() == wanted[used].tolist()
