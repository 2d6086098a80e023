"""Answers of one model under many policies, batch by batch, with what they cost."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from swaa_jax.infer import Answerer, GenerateOptions, Generation, check_prompts, generation_of
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.progress import ProgressLike, ShowProgress, show_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answers", "answer_prompts", "even_batches", "resolve_all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """One policy's answers to one batch.

    Attributes:
        policy: the policy.
        batch: its number among the batches.
        rows: indices of the prompts.
        generation: the answers, in the order of `rows`.
    """

    policy: AttentionPolicy
    batch: int
    rows: tuple[int, ...]
    generation: Generation


def answer_prompts(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    policies: Sequence[AttentionPolicy],
    *,
    batches: Sequence[Sequence[int]],
    options: GenerateOptions,
    skip: Callable[[AttentionPolicy, int], bool] | None = None,
    progress: ProgressLike = None,
) -> Iterator[Answers]:
    """Answer prompts under each policy, yielding each policy's batches as they are done.

    An engine answers all batches of a policy, one after the other: prompts that begin alike, and
    attempts at one, share what is read. Timings hold neither compilation nor a program's first run.

    Args:
        model: a causal language model; its own policy is not used.
        tokenizer: the model's.
        prompts: token ids. A prompt's index seeds its draws.
        policies: all different on this model.
        batches: indices of the prompts that are run together.
        options: how they are answered.
        skip: given a policy and a batch's number, whether it is not to be run.
        progress: who is told how far it is.

    Raises:
        ValueError: a policy that does not fit the model or is there twice, or a prompt and answer
            beyond the model's context.
    """
    resolve_all(model, policies)
    check_prompts(model, prompts, max_new_tokens=options.max_new_tokens)
    wanted = {
        policy: [n for n in range(len(batches)) if skip is None or not skip(policy, n)]
        for policy in policies
    }
    longest = max(map(len, batches), default=1)
    options = dataclasses.replace(options, batch_size=longest, warmup=True)
    with show_progress("answering", total=1, enabled=progress) as bar:
        yield from _answer_wanted(
            model, tokenizer, prompts, wanted, batches=batches, options=options, show=bar.show
        )


def _answer_wanted(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    wanted: Mapping[AttentionPolicy, Sequence[int]],
    *,
    batches: Sequence[Sequence[int]],
    options: GenerateOptions,
    show: ShowProgress,
) -> Iterator[Answers]:
    """See `answer_prompts`; `wanted` are the batches that each policy answers."""
    total = sum(len(batches[number]) for numbers in wanted.values() for number in numbers)
    finished = 0
    for policy, numbers in wanted.items():
        if not numbers:
            continue
        answerer = Answerer(
            model.with_policy(policy),
            tokenizer,
            options,
            # Of all batches, answered or not: a run that goes on has the programs of one that did.
            lengths=[len(prompts[row]) for batch in batches for row in batch],
        )
        for number in numbers:
            rows = tuple(batches[number])
            answering = answerer.start([prompts[row] for row in rows], numbers=rows)
            for tokens in answering:
                show(f"{policy}", (finished + tokens / options.max_new_tokens) / total)
            finished += len(rows)
            yield Answers(
                policy=policy, batch=number, rows=rows, generation=generation_of(answering)
            )
        del answerer, answering  # with their caches, before the next ones are made


def resolve_all(
    model: CausalLM, policies: Sequence[AttentionPolicy]
) -> list[tuple[LayerAttention, ...]]:
    """Each policy's layers.

    Raises:
        ValueError: no policy, one that does not fit the model, or two that are the same on it.
    """
    if not policies:
        raise ValueError("policies: expected at least one, got none")
    resolved: dict[tuple[LayerAttention, ...], AttentionPolicy] = {}
    for policy in policies:
        layers = policy.resolve(model.config.num_layers, num_kv_heads=model.config.num_kv_heads)
        if layers in resolved:
            raise ValueError(
                f"policies: {str(policy)!r} and {str(resolved[layers])!r} are the same for a model "
                f"of {len(layers)} layers; leave one out"
            )
        resolved[layers] = policy
    return list(resolved)


def even_batches(count: int, batch_size: int) -> list[range]:
    """Consecutive rows in as few batches as `batch_size` allows, as even as they go, so that they
    share a bucket.

    >>> even_batches(5, 3)
    [range(0, 3), range(3, 5)]

    Raises:
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    number = -(-count // batch_size)
    ends = [-(-count * (index + 1) // number) for index in range(number)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
