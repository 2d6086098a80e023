"""One model asked one task in one mode: its prompts, their batches, answers and verdicts.

The samples are encoded, sorted by length into batches, answered under each policy, and judged. What
is filed already is not done again.
"""

import abc
import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax import runtime
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.judging import Judge, Judged, strip_thinking
from swaa_jax.eval.run.answering import answer_prompts, even_batches
from swaa_jax.eval.run.config import EvalConfig, PolicyEntry, ServedPolicy, TaskEntry
from swaa_jax.eval.run.costs import CellCost, cell_cost
from swaa_jax.eval.run.entries import ModelEntry, RemoteEntry
from swaa_jax.eval.run.store import AnswerBatch, AnswerRecord, CellStore, fingerprint
from swaa_jax.eval.tasks import Sample, encode_sample
from swaa_jax.fields import show
from swaa_jax.infer import GenerateOptions, Timings, warn_of_thinking
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ShowProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Asking", "Cell", "LocalAsking"]

log = logging.getLogger(__name__)

_OPTIONS = (
    *("max_new_tokens", "seed", "sampling"),
    *("stop", "stop_token_ids", "ignore_eos", "chunk_size"),
)
"""The options, besides those of sampling, that an answer to given token ids depends on; stored
answers are found by them."""

_JUDGE_THREADS = 8
"""Answers that are judged at once: one that is a model behind a URL takes its time."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Cell:
    """One model under one policy, asked one task in one mode.

    Attributes:
        model, policy_name, task: as results call them.
        policy: the policy; None: a server's, who knows it.
        policy_note: where the server is, and what it says.
        thinking: the mode.
        answers: one a sample and attempt, in the order of the samples, with their verdicts, as
            JSON's types.
        skipped: samples beyond the model's context.
        cost: what the answers took.

    Examples:
        >>> from swaa_jax.eval.run.costs import remote_cost
        >>> cell = Cell(
        ...     model="mine", policy_name="as served", policy=None, policy_note="a server's",
        ...     task="qa", thinking=False, answers=(), skipped=0, cost=remote_cost(()),
        ... )
        >>> cell, cell.is_full
        (Cell(mine, as served, qa, non-thinking: 0 answers), False)
    """

    model: str
    policy_name: str
    policy: AttentionPolicy | None
    policy_note: str = ""
    task: str
    thinking: bool
    answers: tuple[AnswerRecord, ...]
    skipped: int
    cost: CellCost

    def __repr__(self) -> str:
        asked = f"{self.model}, {self.policy_name}, {self.task}, {self.mode}"
        return f"Cell({asked}: {len(self.answers)} answers)"

    @property
    def mode(self) -> str:
        """The mode in words."""
        return "thinking" if self.thinking else "non-thinking"

    @property
    def is_full(self) -> bool:
        """Whether it is known to be full attention."""
        return self.policy is not None and self.policy.is_full

    @property
    def policy_text(self) -> str:
        """What the policy is, or nothing where its name says that already."""
        text = self.policy_note if self.policy is None else str(self.policy)
        return "" if text == self.policy_name else text


class Asking(abc.ABC):
    """One model and one task in one mode: encoded samples, their batches, and their files.

    Args:
        config: the evaluation.
        entry: the model.
        tokenizer: the model's; None: there is none, so that a server must render the chats.
        room: tokens of prompt and answer together; None: not known.
        task: the task.
        thinking: the mode.
    """

    def __init__(
        self,
        *,
        config: EvalConfig,
        entry: ModelEntry | RemoteEntry,
        tokenizer: "PreTrainedTokenizerBase | None",
        room: int | None,
        task: TaskEntry,
        thinking: bool,
    ):
        self._config, self._entry, self._room = config, entry, room
        self._tokenizer, self._task, self._thinking = tokenizer, task, thinking
        self._options = _options(config, task, thinking)
        at_least = task.task.prompt_tokens
        if at_least is not None and not self._is_room_for(at_least):
            self._refuse_long("all", at_least)  # a long text takes a minute to make
        if tokenizer is None and task.task.needs_tokenizer:
            raise ValueError(
                f"task {task.name}: expected a tokenizer for {entry.label}, since prompts are made "
                "by their length in tokens, got none; give the served model's, {url: ..., "
                "tokenizer: ...} or --tokenizer"
            )
        given: Any = tokenizer  # a task that needs none takes None
        samples = task.task.samples(given, thinking=thinking)[config.skip_samples :]
        samples = samples[: config.limit]
        prompts: list[list[int]] | None = None
        if tokenizer is not None:
            prompts = [
                encode_sample(one, tokenizer, thinking=thinking, room=room) for one in samples
            ]
        opened = self._which_open_thoughts(prompts or [[]] * len(samples))
        fits = self._fitting(samples, prompts)
        self._skipped = len(samples) - len(fits)
        self._samples = [samples[index] for index in fits]
        self._prompts = None if prompts is None else [prompts[index] for index in fits]
        self._opened = [opened[index] for index in fits]
        self._batches = self._make_batches()

    def _identity_of(self, model: Mapping[str, Any], **more: object) -> dict[str, object]:
        """All that the answers depend on but the policy."""
        return {
            "model": dict(model),
            "task": {"kind": self._task.task.name, **self._task.task.to_dict()},
            "thinking": self._thinking,
            "options": {
                **{name: getattr(self._options, name) for name in _OPTIONS},
                **self._options.sampling_identity,
            },
            "attempts": self._config.attempts,
            **more,
        }

    def _which_open_thoughts(self, prompts: Sequence[Sequence[int]]) -> list[bool]:
        """Of each prompt, whether it ends within a thought; a warning where that is unexpected."""
        tokenizer, thinking = self._tokenizer, self._thinking
        if tokenizer is None:
            return [False] * len(prompts)
        opened = [opens_thinking(tokenizer, ids) for ids in prompts]
        if any(opened) and not thinking:
            log.warning(
                "task %s: expected a chat template that asks %s for an answer without thinking, "
                "got one that opens a thought all the same; answers get no prefix, and those whose "
                "thought does not end within max_new_tokens are wrong; set thinking: true",
                self._task.name,
                self._entry.label,
            )
        if thinking and not any(opened):
            warn_of_thinking(tokenizer, f"task {self._task.name}, thinking")
        return opened

    @abc.abstractmethod
    def _make_batches(self) -> list[list[int]]:
        """Rows that are kept in one file. A row is an attempt at a sample; its number seeds its
        draws.
        """

    @abc.abstractmethod
    def answer(self, policies: Sequence[PolicyEntry | ServedPolicy], progress: ShowProgress) -> int:
        """Answer what is not answered yet; how many answers that were."""

    @abc.abstractmethod
    def _cost(self, entry: PolicyEntry | ServedPolicy, batches: Sequence[AnswerBatch]) -> CellCost:
        """What the answers took."""

    @property
    @abc.abstractmethod
    def _identity(self) -> Mapping[str, object]:
        """See `_identity_of`."""

    @property
    def _where(self) -> str:
        """What is asked, for people who wait."""
        where = f"{self._entry.label}, {self._task.name}"
        return where + (", thinking" if self._thinking else "")

    def judge(
        self, policies: Sequence[PolicyEntry | ServedPolicy], judge: tuple[str, Judge]
    ) -> list[Cell]:
        """Judge what is not judged yet, on process 0, and give a cell for each policy.

        Where the judge failed before, it is asked again.

        Raises:
            ValueError: a judge cannot be reached, or failed on all answers.
        """
        name, judging = judge
        # What a verdict depends on besides the answer.
        asked = [[one.question, list(one.references), one.grading] for one in self._samples]
        key = fingerprint([name, asked])
        if runtime.is_main_process():
            for entry in policies:
                self._judge_batches(self._store(entry.policy), key, judging)
        runtime.wait_for_all("evaluation: verdicts")
        return [self._cell(entry, key) for entry in policies]

    def _judge_batches(self, store: CellStore, key: str, judge: Judge) -> None:
        verdict = functools.partial(self._verdict, judge=judge)
        failed = 0
        for number in range(len(self._batches)):
            if not store.has_verdicts(key, number):
                rows = store.read_answers(number).rows
                with concurrent.futures.ThreadPoolExecutor(_JUDGE_THREADS) as pool:
                    store.write_verdicts(key, number, list(pool.map(verdict, rows)))
            verdicts = store.read_verdicts(key, number)
            failed += sum(one.get("judge_failed", False) for one in verdicts)
        if failed and failed == self._num_rows:
            raise ValueError(
                f"task {self._task.name}: expected verdicts, got none that can be read on any of "
                f"{failed} answers (the last: {show(verdicts[-1]['reason'])}); look at the judging "
                "model, its prompt and max_tokens"
            )

    @property
    def task_name(self) -> str:
        """The task's."""
        return self._task.name

    @property
    def _num_rows(self) -> int:
        return len(self._samples) * self._config.attempts

    def _store(self, policy: AttentionPolicy | None) -> CellStore:
        fields = None if policy is None else policy.to_dict()
        return CellStore(self._config.directory, {**self._identity, "policy": fields})

    def _fitting(
        self, samples: Sequence[Sample], prompts: Sequence[Sequence[int]] | None
    ) -> list[int]:
        """Indices of the samples that the model has room for.

        Raises:
            ValueError: two samples of one id, or a sample beyond the context, unless it is skipped.
        """
        seen: set[str] = set()
        for sample in samples:
            if sample.id in seen:
                raise ValueError(
                    f"task {self._task.name}: expected distinct ids, got {sample.id!r} twice"
                )
            seen.add(sample.id)
        if prompts is None:
            return list(range(len(samples)))
        fits = [index for index, ids in enumerate(prompts) if self._is_room_for(len(ids))]
        if len(fits) < len(samples):
            longest = max(len(ids) for ids in prompts)
            self._refuse_long(f"{len(samples) - len(fits)} of {len(samples)}", longest)
        return fits

    def _is_room_for(self, prompt_tokens: int) -> bool:
        return self._room is None or prompt_tokens + self._options.max_new_tokens <= self._room

    def _refuse_long(self, how_many: str, longest: int) -> None:
        if self._config.too_long == "error":
            raise ValueError(
                f"task {self._task.name}: expected prompts that fit {self._entry.label}'s context "
                f"of {self._room} tokens with answers of up to "
                f"{self._options.max_new_tokens}, got {how_many} that do not (the longest has at "
                f"least {longest} tokens); set too_long=skip to leave them out, lower "
                "max_new_tokens or max_thinking_tokens, or extend the model's context by "
                "config_overrides"
            )

    def _cell(self, entry: PolicyEntry | ServedPolicy, judge_key: str) -> Cell:
        store = self._store(entry.policy)
        records: dict[int, AnswerRecord] = {}
        batches = []
        for number in range(len(self._batches)):
            batch = store.read_answers(number)
            batches.append(batch)
            verdicts = store.read_verdicts(judge_key, number)
            wanted = sorted(self._batches[number])
            rows = sorted(answer["row"] for answer in batch.rows)
            if rows != wanted or len(verdicts) != len(wanted):
                raise ValueError(
                    f"{store.place}: expected an answer and a verdict for each of {len(wanted)} "
                    f"rows of batch {number}, as a run wrote them, got {len(rows)} answers and "
                    f"{len(verdicts)} verdicts; remove the directory, and they are made again"
                )
            for answer, verdict in zip(batch.rows, verdicts, strict=True):
                records[answer["row"]] = self._record(entry, answer, verdict)
        return Cell(
            model=self._entry.label,
            policy_name=entry.name,
            policy=entry.policy,
            policy_note=self._policy_note,
            task=self._task.name,
            thinking=self._thinking,
            answers=tuple(records[row] for row in sorted(records)),
            skipped=self._skipped,
            cost=self._cost(entry, batches),
        )

    @property
    def _policy_note(self) -> str:
        """See `Cell`."""
        return ""

    def _verdict(self, answer: AnswerRecord, *, judge: Judge) -> dict[str, object]:
        index = answer["row"] // self._config.attempts
        sample = self._samples[index]
        verdict = judge(
            Judged(
                question=sample.question,
                references=sample.references,
                response=answer["response"],
                thinking=answer.get("opened", self._opened[index]),
                grading=sample.grading,
            )
        )
        return {
            "score": float(verdict.score),
            "accepted": bool(verdict.accepted),
            "reason": verdict.reason,
            **({"judge_failed": True} if verdict.failed else {}),
        }

    def _record(
        self, entry: PolicyEntry | ServedPolicy, answer: AnswerRecord, verdict: AnswerRecord
    ) -> dict[str, object]:
        index, attempt = divmod(answer["row"], self._config.attempts)
        sample = self._samples[index]
        opened = answer.get("opened", self._opened[index])
        said = strip_thinking(answer["response"], thinking=opened)
        read = answer.get("prompt_tokens")
        return {
            "model": self._entry.label,
            "policy": entry.name,
            "task": self._task.name,
            "thinking": self._thinking,
            "sample": sample.id,
            "attempt": attempt,
            "kind": sample.kind,
            "prompt_tokens": read if self._prompts is None else len(self._prompts[index]),
            "question": sample.question,
            "references": list(sample.references),
            "response": answer["response"],
            "answer": said.text,
            "finished": said.finished,
            "finish_reason": answer["finish_reason"],
            "num_tokens": answer["num_tokens"],
            "info": dict(sample.info),
            **verdict,
        }


class LocalAsking(Asking):
    """A model of this process.

    Args:
        model: the model.
        identity: all of it that answers depend on.
        others: as `Asking` takes them.
    """

    _entry: ModelEntry
    _prompts: list[list[int]]

    def __init__(
        self,
        *,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerBase",
        identity: Mapping[str, object],
        **others: Any,
    ):
        self._model, self._tokenizer = model, tokenizer
        room = getattr(model.config, "max_position_embeddings", None)
        super().__init__(tokenizer=tokenizer, room=room, **others)
        self._kept_under = self._identity_of(
            identity,
            prompts=fingerprint(self._prompts),
            batch_size=self._config.batch_size,
        )

    @property
    def _identity(self) -> Mapping[str, object]:
        return self._kept_under

    def _make_batches(self) -> list[list[int]]:
        attempts = self._config.attempts
        by_length = sorted(
            range(self._num_rows), key=lambda row: (-len(self._prompts[row // attempts]), row)
        )
        return [
            [by_length[at] for at in batch]
            for batch in even_batches(len(by_length), self._config.batch_size)
        ]

    def answer(self, policies: Sequence[PolicyEntry | ServedPolicy], progress: ShowProgress) -> int:
        """See `Asking.answer`."""
        if not self._prompts:
            return 0
        stores = {one.policy: self._store(one.policy) for one in policies if one.policy is not None}
        count = 0
        for done in answer_prompts(
            self._model,
            self._tokenizer,
            [self._prompts[row // self._config.attempts] for row in range(self._num_rows)],
            list(stores),
            batches=self._batches,
            options=self._options,
            skip=lambda policy, batch: stores[policy].has_answers(batch),
            progress=lambda what, part: progress(f"{self._where}: {what}", part),
        ):
            rows = [
                {
                    "row": row,
                    "response": text,
                    "num_tokens": len(tokens),
                    "finish_reason": reason,
                }
                for row, text, tokens, reason in zip(
                    done.rows,
                    done.generation.texts,
                    done.generation.tokens,
                    done.generation.finish_reasons,
                    strict=True,
                )
            ]
            stores[done.policy].write_answers(
                done.batch, AnswerBatch(rows=rows, timings=done.generation.timings)
            )
            count += len(rows)
        runtime.wait_for_all("evaluation: answers")
        return count

    def _cost(self, entry: PolicyEntry | ServedPolicy, batches: Sequence[AnswerBatch]) -> CellCost:
        config = self._model.config
        assert entry.policy is not None  # of a local model
        timings = [batch.timings for batch in batches if batch.timings is not None]
        return cell_cost(
            self._model,
            entry.policy.resolve(config.num_layers, num_kv_heads=config.num_kv_heads),
            prompt_lengths=[len(ids) for ids in self._prompts],
            timings=Timings.total(timings) if timings else None,
        )


def _options(config: EvalConfig, task: TaskEntry, thinking: bool) -> GenerateOptions:
    longest = task.max_new_tokens or task.task.answer_tokens
    return GenerateOptions(
        max_new_tokens=longest + (config.max_thinking_tokens if thinking else 0),
        seed=config.seed,
        **config.sampling_fields,
    )
