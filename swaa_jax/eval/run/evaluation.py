"""`evaluate`: every model of an evaluation is asked every task, and the answers are put together.

What is in `output_dir` already is not done again; the results do not depend on how often the run
was stopped.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
from etils import epath
from jax.sharding import Mesh

from swaa_jax import storage
from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.provenance import describe_device, describe_versions
from swaa_jax.eval.judging import Judge, make_judge
from swaa_jax.eval.judging.rules import CHOICES
from swaa_jax.eval.run.answering import resolve_all
from swaa_jax.eval.run.asking import Asking, Cell, LocalAsking
from swaa_jax.eval.run.config import EvalConfig, PolicyEntry, ServedPolicy, Setting, TaskEntry
from swaa_jax.eval.run.entries import ModelEntry, RemoteEntry
from swaa_jax.eval.run.loading import (
    describe,
    identity_of,
    load_entry,
    warn_of_difference,
)
from swaa_jax.eval.run.remote import RemoteModel
from swaa_jax.eval.run.remote_asking import RemoteAsking
from swaa_jax.models import CausalLM
from swaa_jax.models.function import Structure
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ShowProgress
from swaa_jax.runs import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Evaluation", "evaluate"]

logger = logging.getLogger(__name__)

API_KEY = "SWAA_JUDGE_API_KEY"
"""The environment variable of a judging model's key; it is never written anywhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        config: what was asked.
        cells: in the order of the config: models, tasks, modes, policies.
        models: by label, what is known of each checkpoint.
        dtype: of weights and activations, of all models; empty: servers alone were asked.
        device, versions: what the last run computed on.
        seconds: of the last run.
        answered: answers that the last run made, the rest was there.
    """

    config: EvalConfig
    cells: tuple[Cell, ...]
    models: Mapping[str, Mapping[str, object]]
    dtype: str
    device: Mapping[str, object]
    versions: Mapping[str, str]
    seconds: float
    answered: int


def evaluate(
    config: EvalConfig,
    *,
    load: "Callable[[ModelEntry], tuple[CausalLM, PreTrainedTokenizerBase]] | None" = None,
    mesh: Mesh | str | None = None,
    progress: ShowProgress | None = None,
) -> Evaluation:
    """Run an evaluation, or what is left of it.

    Args:
        config: what is asked.
        load: gives a local model and its tokenizer; None: `load_entry`.
        mesh: as `load_model` takes it.
        progress: told how far it is.

    Raises:
        ValueError: a policy that does not fit a model, prompts beyond its context, malformed data,
            a judge that gave no verdict (what was judged so far is kept), or a server that does
            not answer (what was answered so far is kept).
        NotImplementedError: servers are to be asked from several processes.
        FileNotFoundError: a checkpoint or a data file that is not there.
    """
    start = time.perf_counter()
    _check_output(config.output_dir)  # before any work, all that can be told before
    judges = {entry.name: _judge(entry, config) for entry in config.tasks}
    for task in config.tasks:
        task.task.check()
    _check_remote(config, mesh)
    if load is None:
        load = functools.partial(load_entry, config=config, mesh=mesh)
    entries = [(setting, model) for setting in config.settings for model in setting.models]
    num_asked = len(config.tasks) * len(config.thinking)  # of each policy of a model
    steps = _Steps(progress, sum(_num_policies(*one) for one in entries) * num_asked)
    cells: list[Cell] = []
    asked: set[tuple[str, AttentionPolicy | None]] = set()
    models: dict[str, Mapping[str, object]] = {}
    answered = 0
    dtypes: dict[str, None] = {}
    for setting, entry in entries:
        model = None
        if isinstance(entry, RemoteEntry):
            steps.show(f"looking for {entry.label}", 0.0)
            remote = RemoteModel(entry)
            tokenizer = None if entry.tokenizer is None else load_tokenizer(entry.tokenizer)
            models[entry.label] = remote.describe()
            policies: Sequence[PolicyEntry | ServedPolicy] = [ServedPolicy()]
            make = functools.partial(RemoteAsking, model=remote, tokenizer=tokenizer)
        else:
            steps.show(f"loading {entry.label}", 0.0)
            model, tokenizer = load(entry)
            identity = identity_of(model, entry)
            models[entry.label] = describe(model, entry)
            warn_of_difference(model, entry, config)
            dtypes[str(model.dtype)] = None
            policies = _policies(setting.policies, model, baseline=config.baseline)
            make = functools.partial(
                LocalAsking, model=model, tokenizer=tokenizer, identity=identity
            )
        num_policies = len(policies)
        # A pair that two settings have is asked once.
        policies = [one for one in policies if (entry.label, one.policy) not in asked]
        asked |= {(entry.label, one.policy) for one in policies}
        askings = [
            make(config=config, entry=entry, task=task, thinking=thinking)
            for task in (config.tasks if policies else ())
            for thinking in config.thinking
        ]
        steps.advance((num_policies - len(policies)) * num_asked)
        answered += _answer(askings, policies, model, steps)
        cells += [
            cell for asking in askings for cell in asking.judge(policies, judges[asking.task_name])
        ]
        del model, make, askings  # before the next one is loaded
    return Evaluation(
        config=config,
        cells=tuple(cells),
        models=models,
        dtype=", ".join(dtypes),
        device=describe_device(),
        versions=describe_versions(),
        seconds=time.perf_counter() - start,
        answered=answered,
    )


def _answer(
    askings: Sequence[Asking],
    policies: Sequence[PolicyEntry | ServedPolicy],
    model: CausalLM | None,
    steps: "_Steps",
) -> int:
    """Answers all that is asked of a model, one policy after the other; how many answers it made.

    Each policy has programs of its own, tens of megabytes or more, which are let go before the next
    one's are compiled.
    """
    answered = 0
    for policy in policies:
        for asking in askings:
            answered += asking.answer([policy], steps.show)
            steps.advance(1)
        if model is not None and policy.policy is not None:
            Structure.let_go(model.with_policy(policy.policy))
    return answered


def _num_policies(setting: Setting, entry: ModelEntry | RemoteEntry) -> int:
    """Under which a model of a setting is asked."""
    return 1 if isinstance(entry, RemoteEntry) else len(setting.policies)


def _check_remote(config: EvalConfig, mesh: Mesh | str | None) -> None:
    """Says which settings change nothing where servers alone are asked.

    Raises:
        NotImplementedError: several processes, of which each would ask.
    """
    if not config.remote_models:
        return
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise NotImplementedError(
            f"{config.remote_models[0].label}: expected one process, got {jax.process_count()}, "
            "where a model is asked by its url; ask it in a run of its own, with the same "
            "output_dir"
        )
    if config.local_models:
        return
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    idle = ("batch_size", "dtype", "backend", "baseline")
    given = [name for name in idle if getattr(config, name) != defaults[name]]
    given += ["mesh"] * (mesh is not None)
    if given:
        logger.warning(
            "%s: expected nothing where all models are asked by their url, got a value; without "
            "effect",
            ", ".join(given),
        )


def _check_output(directory: str) -> None:
    """See that answers can be kept, without making anything yet.

    Raises:
        ValueError: the path is not a directory and cannot become one, or cannot be written.
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


class _Steps:
    """Adds up finished steps of equal weight and tells `progress`."""

    def __init__(self, progress: ShowProgress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def show(self, what: str, part: float) -> None:
        if self._progress is not None:
            self._progress(what, min(1.0, (self._done + part) / self._total))

    def advance(self, steps: int) -> None:
        self._done += steps


def _policies(
    entries: Sequence[PolicyEntry | Mapping[str, object]], model: CausalLM, *, baseline: str | None
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


def _judge(task: TaskEntry, config: EvalConfig) -> tuple[str, Judge]:
    """A task's judge, with the fingerprint of its settings."""
    settings = task.judge_settings
    if settings.get("name") == "regex":  # whose patterns by default were others once
        settings.setdefault("pattern", list(CHOICES))
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
