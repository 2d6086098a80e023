"""Shape buckets, so that calls of similar size share one compiled program, and right padding."""

from collections.abc import Sequence

import numpy as np

from kernels_pallas.layout import next_power_of_two

MIN_LENGTH_BUCKET = 32


def length_bucket(length: int, *, limit: int | None = None) -> int:
    """The padded length for `length` tokens: a power of two, or the midpoint below it.

    The buckets are 32, 48, 64, 96, 128, 192, ... so padding never takes more than a third of a row.

    Args:
        length: tokens to hold, at least 0.
        limit: the model's context; no bucket is larger.

    >>> [length_bucket(n) for n in (5, 32, 33, 50, 65, 100)]
    [32, 32, 48, 64, 96, 128]
    >>> length_bucket(1000, limit=1000)
    1000

    Raises:
        ValueError: `length` is larger than `limit`.
    """
    if limit is not None and length > limit:
        raise ValueError(f"length: expected at most the context of {limit} tokens, got {length}")
    power = max(MIN_LENGTH_BUCKET, next_power_of_two(length))
    midpoint = power * 3 // 4
    fits = midpoint >= length and midpoint > MIN_LENGTH_BUCKET
    bucket = midpoint if fits else power
    return bucket if limit is None else min(bucket, limit)


def pad_right(
    token_lists: Sequence[Sequence[int]], *, num_rows: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as one array, padded on the right and with rows of one token below.

        [[7, 8, 9], [5]]  ->  7 8 9 .    lengths 3     '.' is `pad_id`
                              5 . . .            1
                              . . . .            1     a row that only fills the bucket

    Returns:
        tokens, int32 `[num_rows, width]`, and lengths, int32 `[num_rows]`.
    """
    tokens = np.full((num_rows, width), pad_id, np.int32)
    lengths = np.ones((num_rows,), np.int32)
    for row, ids in enumerate(token_lists):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths
