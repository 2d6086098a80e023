"""Tasks of `swaa_jax.eval`, asked of a model while it is trained: a score by task.

Prompts are made and checked before the first step, so that a task that does not fit is told then.
Answers take the likeliest tokens, under the policy that is trained under.
"""

import concurrent.futures
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from swaa_jax import runtime
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.judging import Judge, Judged, make_judge
from swaa_jax.eval.run import TaskEntry
from swaa_jax.eval.run.config import task_entry
from swaa_jax.eval.tasks import Sample, encode_sample
from swaa_jax.infer import generate
from swaa_jax.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TaskScorer", "metric_name", "read_tasks"]

logger = logging.getLogger(__name__)

_JUDGE_THREADS = 8
_OWN = ("loss", "accuracy", "sft_loss", "self_distill_loss")


def metric_name(label: str) -> str:
    """A task's name among the metrics: small letters, digits and underscores.

    >>> metric_name("qa held-out")
    'qa_held_out'
    """
    return re.sub(r"\W+", "_", label.lower()).strip("_")


def read_tasks(name: str, entries: Sequence[object]) -> tuple[TaskEntry, ...]:
    """The tasks of a config.

    Raises:
        ValueError: an unknown kind or setting, or two tasks whose scores would have one name.
    """
    tasks = tuple(task_entry(f"{name}[{at}]", entry) for at, entry in enumerate(entries))
    seen: dict[str, str] = dict.fromkeys(_OWN, "the held-out files")
    for task in tasks:
        key = metric_name(task.name)
        if not key or key in seen:
            raise ValueError(
                f"{name}: expected names that tell the scores apart, got {task.name!r}, which "
                f"{seen.get(key, 'has no letters')} has too; give it a name of its own (name: ...)"
            )
        seen[key] = f"task {task.name!r}"
    return tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """A task with its prompts."""

    entry: TaskEntry
    samples: Sequence[Sample]
    prompts: Sequence[Sequence[int]]
    judge: Judge
    max_new_tokens: int


class TaskScorer:
    """Scores a model on tasks, again and again.

    Args:
        tasks: what is asked.
        tok: the model's tokenizer.
        context: tokens of prompt and answer that the model has room for; None: not known.
        chat_template_kwargs: as in training, so that prompts are rendered alike;
            `enable_thinking` says whether the model thinks first.

    Raises:
        ValueError: malformed records, or prompts that the model has no room for.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        tasks: Sequence[TaskEntry],
        tok: "PreTrainedTokenizerBase",
        *,
        context: int | None,
        chat_template_kwargs: Mapping[str, Any],
    ):
        self._tok = tok
        self._asked = [_ask(entry, tok, context, dict(chat_template_kwargs)) for entry in tasks]

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        return [metric_name(asked.entry.name) for asked in self._asked]

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """The mean score of each task, 0 to 1, by its name; every process calls it.

        Raises:
            ValueError: a judge that came to no verdict on any answer.
        """
        return {metric_name(asked.entry.name): self._score(asked, model) for asked in self._asked}

    def _score(self, asked: _Asked, model: CausalLM) -> float:
        answers = generate(
            model,
            self._tok,
            [list(ids) for ids in asked.prompts],
            max_new_tokens=asked.max_new_tokens,
            progress=False,
        ).texts
        score = _judged(asked, answers, self._tok) if runtime.is_main_process() else 0.0
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            score = float(multihost_utils.broadcast_one_to_all(np.float32(score)))
        if np.isnan(score):
            raise ValueError(
                f"eval_tasks: task {asked.entry.name}: expected verdicts, got none that can be "
                f"read on any of {len(answers)} answers; look at the judging model and its prompt"
            )
        return score


def _ask(
    entry: TaskEntry,
    tok: "PreTrainedTokenizerBase",
    context: int | None,
    variables: dict[str, Any],
) -> _Asked:
    thinking = bool(variables.pop("enable_thinking", False))
    longest = entry.max_new_tokens or entry.task.answer_tokens
    samples = entry.task.samples(tok, thinking=thinking)
    prompts = [
        encode_sample(one, tok, thinking=thinking, chat_template_kwargs=variables, room=context)
        for one in samples
    ]
    most = max(map(len, prompts), default=0)
    if context is not None and most + longest > context:
        raise ValueError(
            f"eval_tasks: task {entry.name}: expected prompts that fit the model's context of "
            f"{context} tokens with answers of up to {longest}, got one of {most}; lower the "
            "task's length or max_new_tokens"
        )
    return _Asked(
        entry=entry,
        samples=samples,
        prompts=prompts,
        judge=make_judge(**entry.judge_settings),
        max_new_tokens=longest,
    )


def _judged(asked: _Asked, answers: Sequence[str], tok: "PreTrainedTokenizerBase") -> float:
    """The mean score; NaN where the judge came to no verdict on any answer."""

    def judge(item: tuple[Sample, Sequence[int], str]) -> float:
        sample, ids, answer = item
        verdict = asked.judge(
            Judged(
                question=sample.question,
                references=sample.references,
                response=answer,
                thinking=opens_thinking(tok, ids),
                grading=sample.grading,
            )
        )
        return float("nan") if verdict.failed else verdict.score

    items = zip(asked.samples, asked.prompts, answers, strict=True)
    with concurrent.futures.ThreadPoolExecutor(_JUDGE_THREADS) as pool:
        scores = np.array(list(pool.map(judge, items)))
    failed = int(np.isnan(scores).sum())
    if failed == len(scores):
        return float("nan")
    if failed:
        logger.warning(
            "task %s: %d of %d answers got no verdict and are left out",
            *(asked.entry.name, failed, len(scores)),
        )
    return float(np.nanmean(scores))
