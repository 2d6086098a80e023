"""`evaluate`: ask, judge, and put together what came of it.

For each model and task: the samples are encoded, sorted by length into batches, answered under each
policy (policies that read a prompt alike share its prefill), and judged. What is in `output_dir`
already is not done again; the results do not depend on how often the run was stopped.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from swaa_jax import runtime, storage
from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.provenance import (
    describe_device,
    describe_model,
    describe_versions,
    weight_marks,
)
from swaa_jax.eval.judging.judges import Judge, Judged, make_judge
from swaa_jax.eval.judging.scorers import strip_thinking
from swaa_jax.eval.run.answering import answer_prompts, even_batches, resolve_all
from swaa_jax.eval.run.config import EvalConfig, ModelEntry, PolicyEntry, TaskEntry
from swaa_jax.eval.run.costs import CellCost, cell_cost
from swaa_jax.eval.run.store import AnswerBatch, CellStore
from swaa_jax.eval.tasks import Sample, encode_sample, opens_thinking
from swaa_jax.infer import DecodeOptions, Timings
from swaa_jax.lora import load_adapter, merge_lora
from swaa_jax.models import CausalLM, load_model
from swaa_jax.policy import AttentionPolicy
from swaa_jax.runs import fingerprint

__all__ = ["Cell", "Evaluation", "evaluate"]

Progress = Callable[[str, float], None]
"""Told what is being done, and which part of the whole is done, 0 to 1."""

API_KEY = "SWAA_JUDGE_API_KEY"
"""The environment variable of a judging model's key; it is never written anywhere."""

_JUDGE_THREADS = 8
"""Answers that a judge looks at at once: one that is a model behind a URL takes its time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model under one policy, asked one task in one mode.

    Attributes:
        model, policy_name, task: as results call them.
        policy: the policy.
        thinking: the mode.
        rows: one an answer, in the order of the samples, as JSON's types; see `RECORD_FIELDS`.
        skipped: samples beyond the model's context.
        cost: what the answers took.
    """

    model: str
    policy_name: str
    policy: AttentionPolicy
    task: str
    thinking: bool
    rows: tuple[Mapping[str, Any], ...]
    skipped: int
    cost: CellCost

    @property
    def policy_text(self) -> str:
        """What the policy is, or nothing where its name says that already."""
        text = str(self.policy)
        return "" if text == self.policy_name else text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        config: what was asked.
        cells: in the order of the config: models, tasks, modes, policies.
        models: by label, what is known of each checkpoint.
        dtype: of weights and activations.
        device, versions: what the last run computed on.
        seconds: of the last run.
        answered: answers that the last run made, the rest was there.
    """

    config: EvalConfig
    cells: tuple[Cell, ...]
    models: Mapping[str, Mapping[str, Any]]
    dtype: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    answered: int


def evaluate(
    config: EvalConfig,
    *,
    load: Callable[[ModelEntry], tuple[CausalLM, Any]] | None = None,
    mesh: Any = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run an evaluation, or what is left of it.

    Args:
        config: what is asked.
        load: gives a model and its tokenizer; None: `load_entry`.
        mesh: as `load_model` takes it.
        progress: told how far it is.

    Raises:
        ValueError: a policy that does not fit a model, prompts beyond its context, malformed data,
            or a judge that gave no verdict (what was judged so far is kept).
        FileNotFoundError: a checkpoint or a data file that is not there.
    """
    start = time.perf_counter()
    _check_output(config.output_dir)  # before any work, all that can be told before
    judges = {entry.name: _judge(entry, config) for entry in config.tasks}
    for task in config.tasks:
        task.task.check()
    load = load or functools.partial(load_entry, config=config, mesh=mesh)
    entries = [(setting, model) for setting in config.settings for model in setting.models]
    steps = _Steps(progress, len(entries) * len(config.tasks) * len(config.thinking))
    cells: list[Cell] = []
    asked: set[tuple[str, AttentionPolicy]] = set()
    models: dict[str, Mapping[str, Any]] = {}
    answered = 0
    for setting, entry in entries:
        steps.show(f"loading {entry.label}", 0.0)
        model, tokenizer = load(entry)
        models[entry.label] = describe_model(model)
        policies = _policies(setting.policies, model, baseline=config.baseline)
        # A pair that two settings have is asked once.
        policies = [one for one in policies if (entry.label, one.policy) not in asked]
        asked |= {(entry.label, one.policy) for one in policies}
        for task in config.tasks:
            for thinking in config.thinking:
                asking = _Asking(
                    config=config,
                    entry=entry,
                    model=model,
                    tokenizer=tokenizer,
                    identity=_identity(model, entry, config),
                    task=task,
                    thinking=thinking,
                )
                answered += asking.answer(policies, steps.show)
                cells += asking.judge(policies, judges[task.name])
                steps.advance()
        del model
    return Evaluation(
        config=config,
        cells=tuple(cells),
        models=models,
        dtype=dtype_of(config),
        device=describe_device(),
        versions=describe_versions(),
        seconds=time.perf_counter() - start,
        answered=answered,
    )


def _check_output(directory: str) -> None:
    """See that answers can be kept, without making anything yet.

    Raises:
        ValueError: it is no directory and cannot become one, or cannot be written.
    """
    if not storage.is_local(directory):
        return
    nearest = pathlib.Path(directory).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"output_dir: expected a directory that can be written, got {directory}, and {nearest} "
            f"is {'not writable' if nearest.is_dir() else 'a file'}; give another one"
        )


class _Asking:
    """One model and one task in one mode: encoded samples, their batches, and their files."""

    def __init__(
        self,
        *,
        config: EvalConfig,
        entry: ModelEntry,
        model: CausalLM,
        tokenizer: Any,
        identity: Mapping[str, Any],
        task: TaskEntry,
        thinking: bool,
    ):
        self._config, self._entry, self._model = config, entry, model
        self._tokenizer, self._task, self._thinking = tokenizer, task, thinking
        samples = task.task.samples(tokenizer, thinking=thinking)[config.skip_samples :]
        samples = samples[: config.limit]
        prompts = [encode_sample(one, tokenizer, thinking=thinking) for one in samples]
        self._options = _decode_options(config, task, thinking)
        fits = self._fitting(samples, prompts)
        self._skipped = len(samples) - len(fits)
        self._samples = [samples[index] for index in fits]
        self._prompts = [prompts[index] for index in fits]
        # Some models' templates open a thought in either mode; it is no answer then either.
        self._opened = [opens_thinking(tokenizer, ids) for ids in self._prompts]
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
            "options": dataclasses.asdict(self._options),
            "attempts": attempts,
            "batch_size": config.batch_size,
        }

    def answer(self, policies: Sequence[PolicyEntry], progress: Progress) -> int:
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
        """Judge what is not judged yet, on process 0, and give a cell for each policy."""
        name, judging = judge
        # What a verdict depends on beside the answer.
        asked = [[one.question, list(one.references), one.grading] for one in self._samples]
        key = fingerprint([name, asked])
        if runtime.is_main_process():
            for entry in policies:
                self._judge_batches(self._store(entry.policy), key, judging)
        runtime.wait_for_all("evaluation: verdicts")
        return [self._cell(entry, key) for entry in policies]

    def _judge_batches(self, store: CellStore, key: str, judge: Judge) -> None:
        verdict = functools.partial(self._verdict, judge=judge)
        for number in range(len(self._batches)):
            if not store.has_verdicts(key, number):
                rows = store.read_answers(number).rows
                with concurrent.futures.ThreadPoolExecutor(_JUDGE_THREADS) as pool:
                    store.write_verdicts(key, number, list(pool.map(verdict, rows)))

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
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is None:
            return list(range(len(samples)))
        room = context - self._options.max_new_tokens
        fits = [index for index, ids in enumerate(prompts) if len(ids) <= room]
        if len(fits) < len(samples) and self._config.too_long == "error":
            longest = max(len(ids) for ids in prompts)
            raise ValueError(
                f"task {self._task.name}: {len(samples) - len(fits)} of {len(samples)} prompts do "
                f"not fit {self._entry.label}'s context of {context} tokens beside answers of "
                f"up to {self._options.max_new_tokens} (the longest prompt has {longest}). Set "
                "too_long=skip to leave them out, lower max_new_tokens or max_thinking_tokens, or "
                "extend the model's context by config_overrides"
            )
        return fits

    def _cell(self, entry: PolicyEntry, judge_key: str) -> Cell:
        store = self._store(entry.policy)
        records: dict[int, Mapping[str, Any]] = {}
        timings = []
        for number in range(len(self._batches)):
            batch = store.read_answers(number)
            timings.append(batch.timings)
            verdicts = store.read_verdicts(judge_key, number)
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
            rows=tuple(records[row] for row in sorted(records)),
            skipped=self._skipped,
            cost=cell_cost(
                self._model,
                layers,
                prompt_lengths=[len(ids) for ids in self._prompts],
                timings=Timings.total(timings) if timings else None,
            ),
        )

    def _verdict(self, answer: Mapping[str, Any], *, judge: Judge) -> dict[str, Any]:
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
        }

    def _record(
        self, entry: PolicyEntry, answer: Mapping[str, Any], verdict: Mapping[str, Any]
    ) -> dict[str, Any]:
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


class _Steps:
    """Adds up finished steps of equal weight and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def show(self, what: str, part: float) -> None:
        if self._progress is not None:
            self._progress(what, min(1.0, (self._done + part) / self._total))

    def advance(self) -> None:
        self._done += 1


def load_entry(entry: ModelEntry, *, config: EvalConfig, mesh: Any = None) -> tuple[CausalLM, Any]:
    """A model with its adapters merged, under full attention, and its tokenizer."""
    tokenizer = load_tokenizer(entry.path, revision=entry.revision)
    model = load_model(
        entry.path,
        policy=AttentionPolicy(),
        dtype=dtype_of(config),
        mesh=mesh,
        revision=entry.revision,
        config_overrides=dict(entry.config_overrides) or None,
        backend=config.backend,
    )
    if entry.adapter is not None:
        model = merge_lora(load_adapter(model, entry.adapter))
    return model, tokenizer


def _identity(model: CausalLM, entry: ModelEntry, config: EvalConfig) -> dict[str, Any]:
    """All of a loaded model that its answers depend on, as JSON's types."""
    return {
        **describe_model(model),
        "weights": weight_marks(model.source),
        "adapter": entry.adapter,
        "adapter_weights": weight_marks(entry.adapter),
        "config_overrides": dict(entry.config_overrides),
        "dtype": dtype_of(config),
        "backend": config.backend,
    }


def dtype_of(config: EvalConfig) -> str:
    """The config's, else float32 on a CPU, where it is faster, and bfloat16 elsewhere."""
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _policies(
    entries: Sequence[PolicyEntry | Mapping[str, Any]], model: CausalLM, *, baseline: str | None
) -> list[PolicyEntry]:
    """The policies of a setting, for this model.

    Raises:
        ValueError: one that does not fit, two that are the same on this model, or a baseline that
            is none of them.
    """
    found = []
    for entry in entries:
        if not isinstance(entry, PolicyEntry):
            policy = AttentionPolicy.from_swaa_config(entry, num_layers=model.config.num_layers)
            entry = PolicyEntry(name=str(policy), policy=policy)
        found.append(entry)
    resolve_all(model, [entry.policy for entry in found])
    names = [entry.name for entry in found]
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline: expected one of {', '.join(names)}, got {baseline!r}")
    return found


def _decode_options(config: EvalConfig, task: TaskEntry, thinking: bool) -> DecodeOptions:
    longest = task.max_new_tokens or task.task.answer_tokens
    return DecodeOptions(
        max_new_tokens=longest + (config.max_thinking_tokens if thinking else 0),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )


def _judge(task: TaskEntry, config: EvalConfig) -> tuple[str, Judge]:
    """A task's judge, with the fingerprint of its settings."""
    settings = task.judge_settings
    name = fingerprint(settings)
    if settings.get("name") == "llm":
        if os.environ.get(API_KEY):
            settings.setdefault("api_key", os.environ[API_KEY])
        if "cache" not in settings and "://" not in str(config.output_dir):
            epath.Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            settings["cache"] = str(epath.Path(config.output_dir) / "judge_cache.jsonl")
    try:
        return name, make_judge(**settings)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from error
