"""One model asked one task in one mode: its prompts, their batches, answers and verdicts.

The samples are encoded, sorted by length into batches, answered under each policy, and judged. What
is filed already is not done again.
"""

import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swaa_jax import runtime
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.judging import Judge, Judged, strip_thinking
from swaa_jax.eval.run.answering import answer_prompts, even_batches
from swaa_jax.eval.run.config import EvalConfig, ModelEntry, PolicyEntry, TaskEntry
from swaa_jax.eval.run.costs import CellCost, cell_cost
from swaa_jax.eval.run.store import AnswerBatch, AnswerRecord, CellStore, fingerprint
from swaa_jax.eval.tasks import Sample, encode_sample
from swaa_jax.fields import show
from swaa_jax.infer import GenerateOptions, Timings, warn_of_thinking
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ShowProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Asking", "Cell"]

log = logging.getLogger(__name__)

_OPTIONS = (
    *("max_new_tokens", "seed", "sampling"),
    *("stop", "stop_token_ids", "ignore_eos", "chunk_size"),
)
"""The options, besides those of sampling, that an answer to given token ids depends on; stored
answers are found by them."""

_JUDGE_THREADS = 8
"""Answers that are judged at once: one that is a model behind a URL takes its time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model under one policy, asked one task in one mode.

    Attributes:
        model, policy_name, task: as results call them.
        policy: the policy.
        thinking: the mode.
        answers: one a sample and attempt, in the order of the samples, with their verdicts, as
            JSON's types.
        skipped: samples beyond the model's context.
        cost: what the answers took.
    """

    model: str
    policy_name: str
    policy: AttentionPolicy
    task: str
    thinking: bool
    answers: tuple[AnswerRecord, ...]
    skipped: int
    cost: CellCost

    @property
    def mode(self) -> str:
        """The mode in words."""
        return "thinking" if self.thinking else "non-thinking"

    @property
    def policy_text(self) -> str:
        """What the policy is, or nothing where its name says that already."""
        text = str(self.policy)
        return "" if text == self.policy_name else text


class Asking:
    """One model and one task in one mode: encoded samples, their batches, and their files."""

    def __init__(
        self,
        *,
        config: EvalConfig,
        entry: ModelEntry,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerBase",
        identity: Mapping[str, object],
        task: TaskEntry,
        thinking: bool,
    ):
        self._config, self._entry, self._model = config, entry, model
        self._tokenizer, self._task, self._thinking = tokenizer, task, thinking
        self._options = _options(config, task, thinking)
        at_least = task.task.prompt_tokens
        if at_least is not None and not self._is_room_for(at_least):
            self._refuse_long("all", at_least)  # a long text takes a minute to make
        samples = task.task.samples(tokenizer, thinking=thinking)[config.skip_samples :]
        samples = samples[: config.limit]
        room = getattr(model.config, "max_position_embeddings", None)
        prompts = [encode_sample(one, tokenizer, thinking=thinking, room=room) for one in samples]
        opened = [opens_thinking(tokenizer, ids) for ids in prompts]
        if any(opened) and not thinking:
            log.warning(
                "task %s: expected a chat template that asks %s for an answer without thinking, "
                "got one that opens a thought all the same; answers get no prefix, and those whose "
                "thought does not end within max_new_tokens are wrong; set thinking: true",
                task.name,
                entry.label,
            )
        if thinking and not any(opened):
            warn_of_thinking(tokenizer, f"task {task.name}, thinking")
        fits = self._fitting(samples, prompts)
        self._skipped = len(samples) - len(fits)
        self._samples = [samples[index] for index in fits]
        self._prompts = [prompts[index] for index in fits]
        self._opened = [opened[index] for index in fits]
        # A row is an attempt at a sample; its number seeds its draws.
        attempts = config.attempts
        by_length = sorted(
            range(len(fits) * attempts), key=lambda row: (-len(self._prompts[row // attempts]), row)
        )
        self._batches = [
            [by_length[at] for at in batch]
            for batch in even_batches(len(by_length), config.batch_size)
        ]
        self._identity = {
            "model": dict(identity),
            "task": {"kind": task.task.name, **dataclasses.asdict(task.task)},
            "thinking": thinking,
            "prompts": fingerprint(self._prompts),
            "options": {
                **{name: getattr(self._options, name) for name in _OPTIONS},
                **self._options.sampling_identity,
            },
            "attempts": attempts,
            "batch_size": config.batch_size,
        }

    def answer(self, policies: Sequence[PolicyEntry], progress: ShowProgress) -> int:
        """Answer what is not answered yet; how many answers that were."""
        if not self._prompts:
            return 0
        by_policy = {entry.policy: entry for entry in policies}
        stores = {policy: self._store(policy) for policy in by_policy}
        where = f"{self._entry.label}, {self._task.name}"
        where += ", thinking" if self._thinking else ""
        count = 0
        for done in answer_prompts(
            self._model,
            self._tokenizer,
            [self._prompts[row // self._config.attempts] for row in range(self._num_rows)],
            list(by_policy),
            batches=self._batches,
            options=self._options,
            skip=lambda policy, batch: stores[policy].has_answers(batch),
            progress=lambda what, part: progress(f"{where}: {what}", part),
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

    def judge(self, policies: Sequence[PolicyEntry], judge: tuple[str, Judge]) -> list[Cell]:
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
        return len(self._prompts) * self._config.attempts

    def _store(self, policy: AttentionPolicy) -> CellStore:
        return CellStore(self._config.output_dir, {**self._identity, "policy": policy.to_dict()})

    def _fitting(self, samples: Sequence[Sample], prompts: Sequence[Sequence[int]]) -> list[int]:
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
        fits = [index for index, ids in enumerate(prompts) if self._is_room_for(len(ids))]
        if len(fits) < len(samples):
            longest = max(len(ids) for ids in prompts)
            self._refuse_long(f"{len(samples) - len(fits)} of {len(samples)}", longest)
        return fits

    def _is_room_for(self, prompt_tokens: int) -> bool:
        context = getattr(self._model.config, "max_position_embeddings", None)
        return context is None or prompt_tokens + self._options.max_new_tokens <= context

    def _refuse_long(self, how_many: str, longest: int) -> None:
        if self._config.too_long == "error":
            raise ValueError(
                f"task {self._task.name}: expected prompts that fit {self._entry.label}'s context "
                f"of {self._model.config.max_position_embeddings} tokens with answers of up to "
                f"{self._options.max_new_tokens}, got {how_many} that do not (the longest has at "
                f"least {longest} tokens); set too_long=skip to leave them out, lower "
                "max_new_tokens or max_thinking_tokens, or extend the model's context by "
                "config_overrides"
            )

    def _cell(self, entry: PolicyEntry, judge_key: str) -> Cell:
        store = self._store(entry.policy)
        records: dict[int, AnswerRecord] = {}
        timings = []
        for number in range(len(self._batches)):
            batch = store.read_answers(number)
            timings.append(batch.timings)
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
        config = self._model.config
        layers = entry.policy.resolve(config.num_layers, num_kv_heads=config.num_kv_heads)
        return Cell(
            model=self._entry.label,
            policy_name=entry.name,
            policy=entry.policy,
            task=self._task.name,
            thinking=self._thinking,
            answers=tuple(records[row] for row in sorted(records)),
            skipped=self._skipped,
            cost=cell_cost(
                self._model,
                layers,
                prompt_lengths=[len(ids) for ids in self._prompts],
                timings=Timings.total(timings) if timings else None,
            ),
        )

    def _verdict(self, answer: AnswerRecord, *, judge: Judge) -> dict[str, object]:
        index = answer["row"] // self._config.attempts
        sample = self._samples[index]
        verdict = judge(
            Judged(
                question=sample.question,
                references=sample.references,
                response=answer["response"],
                thinking=self._opened[index],
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
        self, entry: PolicyEntry, answer: AnswerRecord, verdict: AnswerRecord
    ) -> dict[str, object]:
        index, attempt = divmod(answer["row"], self._config.attempts)
        sample = self._samples[index]
        said = strip_thinking(answer["response"], thinking=self._opened[index])
        return {
            "model": self._entry.label,
            "policy": entry.name,
            "task": self._task.name,
            "thinking": self._thinking,
            "sample": sample.id,
            "attempt": attempt,
            "kind": sample.kind,
            "prompt_tokens": len(self._prompts[index]),
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


def _options(config: EvalConfig, task: TaskEntry, thinking: bool) -> GenerateOptions:
    longest = task.max_new_tokens or task.task.answer_tokens
    return GenerateOptions(
        max_new_tokens=longest + (config.max_thinking_tokens if thinking else 0),
        seed=config.seed,
        **config.sampling_fields,
    )
