"""Buckets are few, never too small, and padding goes to the right."""

import numpy as np
import pytest

from swaa_jax.infer.buckets import length_bucket, next_power_of_two, pad_right


def test_buckets_are_powers_of_two_and_midpoints():
    buckets = sorted({length_bucket(n) for n in range(1, 1025)})
    assert buckets == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


def test_a_bucket_holds_its_length_and_wastes_at_most_a_third():
    for n in range(1, 5000):
        bucket = length_bucket(n)
        assert bucket >= n
        # 33 of 48, 49 of 64, 65 of 96: at least two thirds are used above the smallest bucket.
        assert n <= 32 or n > bucket * 2 / 3


def test_a_bucket_stops_at_the_context():
    assert length_bucket(600, limit=700) == 700
    assert length_bucket(5, limit=16) == 16
    with pytest.raises(ValueError, match=r"context of 700 tokens, got 701"):
        length_bucket(701, limit=700)


def test_batches_go_to_powers_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 17)] == [1, 2, 4, 4, 8, 32]


def test_padding_is_on_the_right_and_rows_that_fill_the_bucket_have_one_token():
    tokens, lengths = pad_right([[7, 8, 9], [5]], num_rows=4, width=5, pad_id=3)
    np.testing.assert_array_equal(
        tokens, [[7, 8, 9, 3, 3], [5, 3, 3, 3, 3], [3, 3, 3, 3, 3], [3, 3, 3, 3, 3]]
    )
    np.testing.assert_array_equal(lengths, [3, 1, 1, 1])
    assert tokens.dtype == lengths.dtype == np.int32
