"""How likely a model finds given continuations, under its attention policy.

A row is context and continuation; the context's tokens are in stage PROMPT, the continuation's in
stage ANSWER, as when the model had written them itself. The last context token is PROMPT, so the
continuation's first token is predicted from a windowed row, as in generation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import Stage
from swaa_jax.infer.buckets import length_bucket, next_power_of_two, pad_right
from swaa_jax.infer.decoding import Structure, split_model
from swaa_jax.infer.prompts import check_context
from swaa_jax.models import CausalLM
from swaa_jax.runtime import to_host
from swaa_jax.train.config import LossConfig
from swaa_jax.train.loss import Head, chunked_loss

__all__ = ["Continuation", "Likelihood", "model_head", "score_continuations"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What is scored, as token ids; both parts hold at least one.

    Attributes:
        context: what is given.
        tokens: what is scored.
        is_answer: the tokens' stage is ANSWER; else PROMPT, as for a text that is only read.
    """

    context: Sequence[int]
    tokens: Sequence[int]
    is_answer: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        logprob: the sum of its tokens' natural log-probabilities.
        is_greedy: every token is the likeliest one.
    """

    logprob: float
    is_greedy: bool


def score_continuations(
    model: CausalLM,
    continuations: Sequence[Continuation],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation, in their order.

    Rows are run in batches of similar length, padded to a bucket; neither changes what a row sees.

    Args:
        model: under the policy that is to be scored.
        continuations: at least one token of context each.
        batch_size: rows run at once, at most.
        on_progress: called now and then with how many are done.

    Raises:
        ValueError: an empty context or continuation, a token id out of the vocabulary, or a row
            beyond the model's context.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    for number, one in enumerate(continuations):
        if not len(one.context) or not len(one.tokens):
            raise ValueError(
                f"continuation {number}: expected at least one token of context and one to score, "
                f"got {len(one.context)} and {len(one.tokens)}"
            )
    context = getattr(model.config, "max_position_embeddings", None)
    rows = [[*one.context, *one.tokens] for one in continuations]
    check_context(rows, max_new_tokens=0, vocab_size=model.config.vocab_size, context=context)
    split = split_model(model)
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(by_length), batch_size):
        group = by_length[start : start + batch_size]
        found |= zip(group, _score(split, [continuations[i] for i in group], context), strict=True)
        if on_progress is not None:
            on_progress(len(found))
    return [found[index] for index in range(len(rows))]


def _score(split: Any, group: Sequence[Continuation], context: int | None) -> list[Likelihood]:
    """One batch."""
    rows = [[*one.context, *one.tokens] for one in group]
    count = next_power_of_two(len(rows))
    width = length_bucket(max(len(row) for row in rows), limit=context)
    tokens, lengths = pad_right(rows, num_rows=count, width=width, pad_id=0)
    scored = length_bucket(max(len(one.tokens) for one in group), limit=width)
    stages = np.full((count, width), Stage.PROMPT, np.int32)
    targets, at = np.zeros((count, scored), np.int32), np.zeros((count, scored), np.int32)
    for row, one in enumerate(group):
        first, size = len(one.context), len(one.tokens)
        if one.is_answer:
            stages[row, first : first + size] = Stage.ANSWER
        targets[row, :size] = one.tokens
        at[row, :size] = np.arange(first - 1, first + size - 1)  # where each one is predicted
    nll, correct = map(
        to_host,
        _token_losses(
            split.arrays, tokens, lengths, stages, at, targets, structure=split.structure
        ),
    )
    return [
        Likelihood(
            logprob=-float(np.sum(nll[row, : len(one.tokens)], dtype=np.float64)),
            is_greedy=bool(np.all(correct[row, : len(one.tokens)])),
        )
        for row, one in enumerate(group)
    ]


@functools.partial(jax.jit, static_argnames=("structure",))
def _token_losses(
    arrays: tuple[Array, ...],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    stage_ids: Int[Array, "B T"],
    at: Int[Array, "B n"],
    targets: Int[Array, "B n"],
    *,
    structure: Structure,
) -> tuple[Float[Array, "B n"], Bool[Array, "B n"]]:
    """NLL of each target, predicted at row `at`; and whether it has the largest logit."""
    model = structure.merge(arrays)
    hidden = model(tokens, lengths=lengths, stage_ids=stage_ids, logits_at=at, return_hidden=True)
    _, each = chunked_loss(
        hidden,
        model_head(model),
        targets,
        jnp.ones(targets.shape, jnp.float32),
        config=LossConfig(),
        each_target=True,
        mesh=model.mesh,
    )
    assert each is not None  # what `each_target` asks for
    return each.nll, each.correct


def model_head(model: CausalLM) -> Head:
    """The matrix of the model's logits, for `chunked_loss`; frozen."""
    tied = model.lm_head is None
    variable = model.embed_tokens.embedding if model.lm_head is None else model.lm_head.kernel
    rows, columns = variable.get_metadata().get("axes") or (None, None)
    return Head(
        weight=variable[...],
        vocab_axis=0 if tied else 1,
        axes=(rows, columns),
        softcap=model.config.logits_softcap,
    )
