"""Answers of one model under many policies, batch by batch, with what they cost.

policies that read a prompt alike          one prefill          each decodes for itself
  window 64                      -.                          .-> ring caches
  window 64, FA decode           -'-> full caches (shared) -'--> full caches
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from swaa_jax.infer import (
    GenerateOptions,
    Generation,
    Prefilled,
    check_prompts,
    compile_counts,
    decode_from,
    prefill_prompts,
)
from swaa_jax.infer.generate import pad_token_id
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.progress import ShowProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answers", "answer_prompts", "even_batches", "resolve_all"]

PREFILL_WEIGHT = 0.5
"""What a prefill counts in the progress shown, where a decode run counts 1."""


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
    progress: ShowProgress | None = None,
) -> Iterator[Answers]:
    """Answer prompts under each policy, yielding each policy's batches as they are done.

    Policies that differ only in `decode` share their prefill, which then keeps the full caches that
    the most demanding of them needs; the others turn theirs into rings. The tokens are those that
    each policy would give on its own. Timings hold neither compilation nor a program's first run;
    where policies share a prefill its time is in the timings of each.

    Args:
        model: a causal language model; its own policy is not used.
        tokenizer: the model's.
        prompts: token ids. A prompt's index seeds its draws.
        policies: all different on this model.
        batches: indices of the prompts that are run together.
        options: how they are answered.
        skip: given a policy and a batch's number, whether it is not to be run.
        progress: told what is being done and which part of the whole is done, 0 to 1.

    Raises:
        ValueError: a policy that does not fit the model or is there twice, or a prompt and answer
            beyond the model's context.
    """
    groups = _prefill_groups(model, policies)
    check_prompts(model, prompts, max_new_tokens=options.max_new_tokens)
    wanted = {
        (policy, number)
        for policy in policies
        for number in range(len(batches))
        if skip is None or not skip(policy, number)
    }
    pad_id = pad_token_id(tokenizer)
    warm_up = dataclasses.replace(
        options, max_new_tokens=min(2, options.max_new_tokens), ignore_eos=True
    )
    warmed: set[tuple[AttentionPolicy, tuple[int, ...], int]] = set()
    work = sum(len(batches[number]) for _, number in wanted)
    work += sum(
        PREFILL_WEIGHT * len(rows)
        for group in groups
        for number, rows in enumerate(batches)
        if any((policy, number) in wanted for policy in group.policies)
    )
    done = _Done(progress, total=work)
    for group in groups:
        for number, rows in enumerate(batches):
            chosen = [policy for policy in group.policies if (policy, number) in wanted]
            if not chosen:
                continue
            done.begin(f"{group.reader}")
            prefilled = _prefill(
                model.with_policy(group.reader),
                [prompts[row] for row in rows],
                max_new_tokens=options.max_new_tokens,
                row_ids=rows,
                pad_id=pad_id,
            )
            done.add(PREFILL_WEIGHT * len(rows))
            for policy in chosen:
                done.begin(f"{policy}")
                answering = model.with_policy(policy)
                program = (policy, prefilled.logits.shape, prefilled.caches.nbytes)
                if program not in warmed:  # its first run, of one step, is not timed
                    decode_from(answering, tokenizer, prefilled, options=warm_up, keep_caches=True)
                    warmed.add(program)
                generation = decode_from(
                    answering,
                    tokenizer,
                    prefilled,
                    options=options,
                    keep_caches=policy != chosen[-1],
                    on_progress=lambda tokens: done.show(tokens / options.max_new_tokens),
                )
                done.add(float(len(rows)))
                yield Answers(policy=policy, batch=number, rows=tuple(rows), generation=generation)


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


@dataclasses.dataclass(frozen=True)
class _PrefillGroup:
    """Policies that read a prompt alike, and the one that the prompt is read under."""

    policies: tuple[AttentionPolicy, ...]
    reader: AttentionPolicy


def _prefill_groups(model: CausalLM, policies: Sequence[AttentionPolicy]) -> list[_PrefillGroup]:
    groups: dict[tuple[LayerAttention, ...], list[AttentionPolicy]] = {}
    for policy, layers in zip(policies, resolve_all(model, policies), strict=True):
        reads_as = tuple(dataclasses.replace(layer, full_decode=False) for layer in layers)
        groups.setdefault(reads_as, []).append(policy)
    return [
        _PrefillGroup(
            tuple(members),
            # A full cache can become a ring, not the other way round.
            members[0] if len(members) == 1 else dataclasses.replace(members[0], decode="full"),
        )
        for members in groups.values()
    ]


def _prefill(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    row_ids: Sequence[int],
    pad_id: int,
) -> Prefilled:
    """`prefill_prompts`; where it had to compile, a second run is the one that is timed."""
    read = functools.partial(
        prefill_prompts,
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        row_ids=row_ids,
        pad_id=pad_id,
    )
    before = compile_counts()
    prefilled = read()
    if compile_counts() == before:
        return prefilled
    compile_s = prefilled.compile_s
    del prefilled  # its caches
    return dataclasses.replace(read(), compile_s=compile_s)


class _Done:
    """Adds up finished work and tells `progress`."""

    def __init__(self, progress: ShowProgress | None, *, total: float):
        self._progress, self._total = progress, total
        self._finished, self._what = 0.0, ""

    def begin(self, what: str) -> None:
        self._what = what
        self.show(0.0)

    def show(self, more: float) -> None:
        if self._progress is not None:
            self._progress(self._what, min(1.0, (self._finished + more) / self._total))

    def add(self, amount: float) -> None:
        self._finished += amount
        self.show(0.0)
