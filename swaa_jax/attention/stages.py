"""Which rows see everything: stages and a layer's policy become the kernels' `q_full`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels_pallas.mask import segment_begins
from swaa_jax.attention.traced import RowWindows
from swaa_jax.policy import LayerAttention, Stage

__all__ = ["full_new_rows", "full_rows", "tail_rows"]


def full_rows(
    layer: LayerAttention | RowWindows,
    *,
    shape: tuple[int, int],
    stage_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"] | None:
    """The rows of a windowed layer that see all keys of their segment: answers and prompt tails.

    Args:
        layer: a layer of like heads. Its ANSWER rows are full where it decodes in full, and the
            last `full_attention_tail` rows of every run of PROMPT rows are full.
        shape: `(B, T)`, whole rows: a chunk of them takes its part of the result, since where a
            prompt ends may only be seen after the chunk.
        stage_ids: stage of each token. None: all PROMPT.
        lengths: real tokens of each row, where the last run ends. None: all T.
        segment_ids: a run ends where a segment does. None: one segment.

    Returns:
        None where no row can be full, or where the layer is full in any case.

    Examples:
        >>> layer = LayerAttention(window=64, full_decode=True)
        >>> full_rows(layer, shape=(1, 4), stage_ids=jnp.array([[0, 0, 1, 1]])).tolist()
        [[False, False, True, True]]
    """
    if layer.is_full:
        return None
    is_answer = jnp.zeros(shape, bool) if stage_ids is None else stage_ids == Stage.ANSWER
    rows = is_answer if layer.full_decode and stage_ids is not None else None
    if layer.full_attention_tail:
        begins = jnp.zeros(shape, bool) if segment_ids is None else segment_begins(segment_ids)
        if lengths is not None:
            begins |= jnp.arange(shape[1]) == lengths[:, None]
        tail = tail_rows(is_answer, begins, size=layer.full_attention_tail)
        rows = tail if rows is None else rows | tail
    return rows


def full_new_rows(
    layer: LayerAttention,
    *,
    positions: Int[Array, "B n"],
    stage_ids: Int[Array, "B n"] | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> Bool[Array, "B n"] | None:
    """The rows that see all keys, of a few tokens after others: `full_rows` where it is not known
    what comes after, but how long the row's prompt is.

    Args:
        layer: a layer of like heads.
        positions: where the tokens stand.
        stage_ids: stage of each token. None: all ANSWER.
        prompt_lengths: tokens of each row's prompt, which decide on the prompt's tail. Not needed
            where the layer has none, or all tokens are ANSWER.

    Returns:
        None where no row can be full, or where the layer is full in any case.

    Raises:
        ValueError: the layer has a tail, and there are stages but no `prompt_lengths`.
    """
    if layer.is_full:
        return None
    if stage_ids is None:
        return jnp.ones(positions.shape, bool) if layer.full_decode else None
    is_answer = stage_ids == Stage.ANSWER
    rows = is_answer if layer.full_decode else None
    if layer.full_attention_tail:
        if prompt_lengths is None:
            raise ValueError(
                "prompt_lengths: expected the length of each row's prompt under "
                f"full_attention_tail={layer.full_attention_tail}, got None; give it, or read "
                "prompts whole"
            )
        tail = positions >= prompt_lengths[:, None] - layer.full_attention_tail
        rows = (tail & ~is_answer) if rows is None else jnp.where(is_answer, rows, tail)
    return rows


def tail_rows(is_answer: Any, begins: Any, *, size: int) -> Any:
    """The last rows of every run of PROMPT rows, in numpy or jnp, in O(T).

    A run ends where an ANSWER row, another segment or the padding begins, and at the row's end. A
    row is in the tail when a run ends among the `size` indices after it::

        stage      P P P P A A P P | P P P -      size 2, a segment begins at 8, padding at 11
        ends       . . . . x x . .   x . . x
        so far     0 0 0 0 1 2 2 2   3 3 3 4
        tail           x x     x x     x x

    Args:
        is_answer: bool `[..., T]`.
        begins: bool `[..., T]`, the first token of a segment, or of the padding.
        size: rows of a tail.

    Returns:
        Bool `[..., T]`; what padding holds means nothing.

    Examples:
        >>> answers, begins = jnp.array([0, 0, 0, 1, 1, 0], bool), jnp.zeros(6, bool)
        >>> tail_rows(answers, begins, size=2).astype(int).tolist()
        [0, 1, 1, 0, 0, 1]
    """
    xp = np if isinstance(is_answer, np.ndarray) else jnp
    width = is_answer.shape[-1]
    size = min(size, width)
    after = [(0, 0)] * (is_answer.ndim - 1) + [(0, size)]
    so_far = xp.cumsum(xp.pad(is_answer | begins, after, constant_values=True), axis=-1)
    return ~is_answer & (so_far[..., size:] > so_far[..., :width])
