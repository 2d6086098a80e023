"""A batch: arrays of several rows, each holding one or more whole samples, padded on the right."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Float, Int

from swaa_jax.data.encode import Sample
from swaa_jax.policy import Stage

__all__ = ["Batch", "PAD_SEGMENT", "make_batch"]

AnyArray: TypeAlias = np.ndarray | jax.Array
PAD_SEGMENT = -1
"""Segment id of padding.

>>> from swaa_jax.data import Sample
>>> sample = Sample(tokens=np.arange(2), stage_ids=np.zeros(2, int), is_target=np.ones(2, bool))
>>> batch = make_batch([[(0, sample)]], width=3)
>>> (batch.segment_ids != PAD_SEGMENT).tolist()
[[True, True, False]]
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of packed samples.

    All arrays are aligned with the token that the model reads::

        samples          a b C D    and    e F G       (capitals: the answers' tokens)
        tokens           a  b  C  D  e  F  G  -
        segment_ids      0  0  0  0  1  1  1 -1
        positions        0  1  2  3  0  1  2  0
        stage_ids        P  P  A  A  P  A  A  P
        targets          b  C  D  -  F  G  -  -        the next token of the same sample
        loss_weights     .  1  1  .  1  1  .  .        of predicting `targets` from this token
        lengths          7

    The first answer token is predicted from the last prompt token, whose stage is PROMPT; the last
    token of a sample predicts nothing. A row that only fills up a batch has length 0.

    A batch is a pytree: of numpy arrays as it is loaded, of whatever `jax.tree.map` makes of them.

    Attributes:
        tokens: ids; the pad id after `lengths`.
        targets: the id that follows; the pad id where `loss_weights` must be 0.
        segment_ids: from 0 in each row, `PAD_SEGMENT` after `lengths`.
        stage_ids: `Stage` of each token.
        positions: of each token in its sample, 0 in the padding.
        loss_weights: of predicting `targets`.
        sample_ids: number of the sample, -1 in the padding.
        lengths: tokens of each row that are no padding.

    Examples:
        >>> answer = np.array([False, False, True])  # behind a prompt of two tokens
        >>> sample = Sample(tokens=np.array([5, 6, 7]), stage_ids=answer * 1, is_target=answer)
        >>> batch = make_batch([[(0, sample)]], width=4)
        >>> batch.targets.tolist(), batch.loss_weights.tolist(), batch.padding_share
        ([[6, 7, 0, 0]], [[0.0, 1.0, 0.0, 0.0]], 0.25)
    """

    tokens: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    segment_ids: Int[AnyArray, "B T"]
    stage_ids: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    loss_weights: Float[AnyArray, "B T"]
    sample_ids: Int[AnyArray, "B T"]
    lengths: Int[AnyArray, " B"]

    @property
    def padding_share(self) -> float:
        """Share of the tokens that is padding."""
        return 1.0 - float(np.sum(self.lengths)) / self.tokens.size


def make_batch(
    rows: Sequence[Sequence[tuple[int, Sample]]], *, width: int, pad_id: int = 0
) -> Batch:
    """Samples, each with its number, put side by side in rows of `width` tokens.

    Raises:
        ValueError: a row that is longer.

    Examples:
        >>> given = np.zeros(2, int)
        >>> sample = Sample(tokens=np.arange(2), stage_ids=given, is_target=given > 0)
        >>> batch = make_batch([[(0, sample), (1, sample)], []], width=5)
        >>> batch.segment_ids.tolist(), batch.lengths.tolist()
        ([[0, 0, 1, 1, -1], [-1, -1, -1, -1, -1]], [4, 0])
    """
    shape = (len(rows), width)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    segment_ids, sample_ids = np.full(shape, PAD_SEGMENT, np.int32), np.full(shape, -1, np.int32)
    stage_ids = np.full(shape, Stage.PROMPT, np.int32)
    positions, lengths = np.zeros(shape, np.int32), np.zeros(len(rows), np.int32)
    loss_weights = np.zeros(shape, np.float32)
    for row, samples in enumerate(rows):
        end = 0
        for segment, (number, sample) in enumerate(samples):
            start, end = end, end + len(sample)
            if end > width:
                raise ValueError(f"row {row}: expected at most {width} tokens, got {end} or more")
            tokens[row, start:end] = sample.tokens
            targets[row, start : end - 1] = sample.tokens[1:]
            loss_weights[row, start : end - 1] = sample.is_target[1:]
            stage_ids[row, start:end] = sample.stage_ids
            segment_ids[row, start:end] = segment
            sample_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
        lengths[row] = end
    return Batch(
        tokens=tokens,
        targets=targets,
        segment_ids=segment_ids,
        stage_ids=stage_ids,
        positions=positions,
        loss_weights=loss_weights,
        sample_ids=sample_ids,
        lengths=lengths,
    )
