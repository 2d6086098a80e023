"""How likely a model finds given continuations, under its attention policy.

A row is context and continuation; the context's tokens are in stage PROMPT, the continuation's in
stage ANSWER, as when the model had written them itself. The last context token is PROMPT, so the
continuation's first token is predicted from a windowed row, as in generation.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.layout import next_power_of_two
from swaa_jax.arguments import check_model
from swaa_jax.attention import LayerKind, RowWindows
from swaa_jax.costs import working_bytes
from swaa_jax.fields import integer, wrong
from swaa_jax.infer.buckets import length_bucket, pad_right
from swaa_jax.infer.prompts import check_context
from swaa_jax.losses import TargetLosses, target_losses
from swaa_jax.memory import Demand, bytes_of_arrays, memory_here, told_when_full
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, Structure, jit_by_structure, split_model
from swaa_jax.policy import AttentionPolicy, LayerAttention, PolicyLike, Stage, load_policy
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.runtime import to_host
from swaa_jax.sharding import batch_parts

__all__ = [
    "Continuation",
    "Likelihood",
    "losses_at",
    "reading_demand",
    "row_kinds",
    "row_windows",
    "score_continuations",
    "score_policies",
]


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

    def __post_init__(self) -> None:
        for name in ("context", "tokens"):
            if isinstance(getattr(self, name), str | bytes):
                raise wrong(name, "token ids", getattr(self, name), "encode it: tok.encode(...)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a model finds one continuation.

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
    progress: ProgressLike = None,
) -> list[Likelihood]:
    """The likelihood of each continuation, in their order.

    Rows are run in batches of similar length, padded to a bucket; neither changes what a row sees.

    Args:
        model: under the policy that is to be scored.
        continuations: at least one token of context each.
        batch_size: rows run at once, at most.
        progress: who is told how many are scored; see `swaa_jax.progress`.

    Raises:
        ValueError: an empty context or continuation, a token id out of the vocabulary, a row
            beyond the model's context, or logits that are not numbers.
    """
    context = _check(model, continuations, batch_size)
    split = split_model(model)
    by_length = _longest_first(continuations)
    found: dict[int, Likelihood] = {}
    total = len(continuations)
    with show_progress("scoring", total=total, unit="texts", enabled=progress) as bar:
        for start in range(0, total, batch_size):
            group = by_length[start : start + batch_size]
            scored = _score(split, [continuations[i] for i in group], context)
            _check_numbers(scored, group)
            found |= zip(group, scored, strict=True)
            bar.show(bar.text, len(found))
    return [found[index] for index in range(len(continuations))]


def score_policies(
    model: CausalLM,
    continuations: Sequence[Continuation],
    policies: Sequence[PolicyLike],
    *,
    batch_size: int = 8,
) -> list[list[Likelihood]]:
    """The likelihood of each continuation under each policy: a list a policy, in their order.

    Policies with the same sinks are rows of one program, compiled once for a width, whatever their
    windows, full layers and decoding ("window" or "full") are. Those with full heads, a tail, or
    decoding that differs by layer run each by itself. It saves compiling; a program of its own is
    the faster one once it is there.

    Args:
        model: its own policy does not matter.
        continuations: at least one token of context each.
        policies: at least one, each in any form that `load_policy` reads.
        batch_size: rows run at once, at most: continuations times policies.

    Raises:
        ValueError: as `score_continuations`, no policy, or one that does not fit the model.
    """
    if isinstance(policies, str | AttentionPolicy | Mapping):
        raise wrong("policies", "a list of policies", policies, "for that one write [...]")
    policies = [load_policy(policy) for policy in policies]
    if not policies:
        raise ValueError("policies: expected at least one, got none")
    context = _check(model, continuations, batch_size)
    config = model.config
    resolved = [
        policy.resolve(config.num_layers, num_kv_heads=config.num_kv_heads) for policy in policies
    ]
    found: dict[int, list[Likelihood]] = {}
    together: dict[int, list[int]] = {}
    for number, policy in enumerate(policies):
        shares = not policy.full_attention_heads and not policy.full_attention_tail
        if shares and policy.decode in ("window", "full"):
            together.setdefault(policy.num_sink_tokens, []).append(number)
        else:
            one = model.with_policy(policy)
            found[number] = score_continuations(
                one, continuations, batch_size=batch_size, progress=False
            )
    split = split_model(model.with_policy(AttentionPolicy()))
    for sinks, numbers in together.items():
        scores: dict[int, dict[int, Likelihood]] = {number: {} for number in numbers}
        work = [(number, row) for row in _longest_first(continuations) for number in numbers]
        for start in range(0, len(work), batch_size):
            part = work[start : start + batch_size]
            # What is read is windowed, and so is an answer without FA decode.
            group = [
                continuations[row]
                if policies[number].decode == "full"
                else dataclasses.replace(continuations[row], is_answer=False)
                for number, row in part
            ]
            layers = [resolved[number] for number, _ in part]
            likelihoods = _score(split, group, context, layers=layers, num_sink_tokens=sinks)
            _check_numbers(likelihoods, [row for _, row in part])
            for (number, row), likelihood in zip(part, likelihoods, strict=True):
                scores[number][row] = likelihood
        for number in numbers:
            found[number] = [scores[number][row] for row in range(len(continuations))]
    return [found[number] for number in range(len(policies))]


def _check(model: CausalLM, continuations: Sequence[Continuation], batch_size: int) -> int | None:
    """Checks that the continuations can be scored, and gives the model's context."""
    check_model("model", model)
    integer(least=1)("batch_size", batch_size)
    for number, one in enumerate(continuations):
        if not isinstance(one, Continuation):
            raise wrong(f"continuation {number}", "a Continuation", one)
        if not len(one.context) or not len(one.tokens):
            raise ValueError(
                f"continuation {number}: expected at least one token of context and one to score, "
                f"got {len(one.context)} and {len(one.tokens)}"
            )
    context = getattr(model.config, "max_position_embeddings", None)
    rows = [[*one.context, *one.tokens] for one in continuations]
    check_context(rows, max_new_tokens=0, vocab_size=model.config.vocab_size, context=context)
    return context


def _check_numbers(likelihoods: Sequence[Likelihood], numbers: Sequence[int]) -> None:
    """Refuses what NaN or infinite logits give; `numbers` are the continuations'."""
    for number, one in zip(numbers, likelihoods, strict=True):
        if not math.isfinite(one.logprob):
            raise ValueError(
                f"continuation {number}: expected a log-probability, got NaN or infinity; see "
                "whether the weights are whole, and load the model in bfloat16 or float32 if it is "
                "in float16"
            )


def _longest_first(continuations: Sequence[Continuation]) -> list[int]:
    """The indices by falling length, so that those of similar length share a batch."""
    lengths = [len(one.context) + len(one.tokens) for one in continuations]
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _score(
    split: SplitModel,
    group: Sequence[Continuation],
    context: int | None,
    *,
    layers: Sequence[Sequence[LayerAttention]] | None = None,
    num_sink_tokens: int = 0,
) -> list[Likelihood]:
    """The likelihoods of one batch; with `layers`, each row's under its own; these share sinks."""
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
    windows = None
    if layers is not None:
        windows = np.full((split.config.num_layers, count), width, np.int32)
        for row, own in enumerate(layers):
            windows[:, row] = row_windows(own, width)
    with told_when_full(lambda: reading_demand(split, rows=count, tokens=width)):
        losses = _token_losses(
            split.arrays,
            tokens,
            lengths,
            stages,
            at,
            targets,
            windows,
            structure=split.structure,
            num_sink_tokens=num_sink_tokens,
        )
        nll, correct = map(to_host, losses)
    return [
        Likelihood(
            logprob=-float(np.sum(nll[row, : len(one.tokens)], dtype=np.float64)),
            is_greedy=bool(np.all(correct[row, : len(one.tokens)])),
        )
        for row, one in enumerate(group)
    ]


def reading_demand(
    model: SplitModel,
    *,
    rows: int,
    tokens: int,
    row_option: str = "batch_size",
    token_option: str = "continuations",
) -> Demand:
    """What rows that are read in one piece ask of each device; the options are what says so.

    It is asked where this process runs out of memory, and asks no other process.
    """
    weights = bytes_of_arrays(model.arrays.values())
    parts, _ = batch_parts(model.mesh)

    def bytes_of(rows: int, tokens: int) -> int:
        working = working_bytes(model, context=tokens, read=tokens, is_paged=False)
        return weights + -(-rows // parts) * working

    return Demand(
        rows=rows,
        tokens=tokens,
        row_option=row_option,
        token_option=token_option,
        bytes_of=bytes_of,
        memory=memory_here(next(iter(model.arrays.values()))),
        advice="or split the model over more devices (mesh)",
    )


@functools.partial(jit_by_structure, static_argnames=("num_sink_tokens",))
def _token_losses(
    arrays: dict[str, Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    stage_ids: Int[Array, "B T"],
    at: Int[Array, "B n"],
    targets: Int[Array, "B n"],
    windows_LB: Int[Array, "L B"] | None,
    *,
    structure: Structure[CausalLM],
    num_sink_tokens: int,
) -> tuple[Float[Array, "B n"], Bool[Array, "B n"]]:
    """NLL of each target, predicted at row `at`; and whether it has the largest logit.

    Without windows under the model's own policy; else FA decode where the stage is ANSWER.
    """
    layers = None
    if windows_LB is not None:
        shared = LayerAttention(window=1, num_sink_tokens=num_sink_tokens, full_decode=True)
        layers = row_kinds([shared] * windows_LB.shape[0], windows_LB)
    each = losses_at(
        structure.build(arrays),
        tokens,
        lengths=lengths,
        stage_ids=stage_ids,
        at=at,
        targets=targets,
        layers=layers,
    )
    return each.nll, each.correct


def losses_at(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"],
    stage_ids: Int[Array, "B T"],
    at: Int[Array, "B n"],
    targets: Int[Array, "B n"],
    layers: Sequence[LayerKind] | None = None,
) -> TargetLosses:
    """The losses of targets that are predicted at rows `at`; logits of other rows are not made.

    Args:
        model: inside jit.
        tokens, lengths, stage_ids: as in `CausalLM.hidden_states`.
        at: rows that predict.
        targets: what each of them should predict.
        layers: what each layer sees, in place of the model's policy.
    """
    hidden = model.hidden_states(tokens, lengths=lengths, stage_ids=stage_ids, layers=layers).hidden
    hidden = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
    return target_losses(hidden, model.vocab_head(), targets, mesh=model.mesh)


def row_windows(layers: Sequence[LayerAttention], width: int) -> Int[np.ndarray, " L"]:
    """Each layer's window, for rows of `width` tokens: those see everything in a full layer."""
    return np.minimum(np.array([layer.window or width for layer in layers], np.int32), width)


def row_kinds(layers: Sequence[LayerAttention], windows_LB: Int[Array, "L B"]) -> list[RowWindows]:
    """The layers with the rows' windows; sinks, decoding and tail are what all rows share."""
    return [
        RowWindows(
            window=windows_LB[number],
            num_sink_tokens=layer.num_sink_tokens,
            full_decode=layer.full_decode,
            full_attention_tail=layer.full_attention_tail,
        )
        for number, layer in enumerate(layers)
    ]
