"""`evaluate`: models x policies x tasks, asked, judged and put together; resumable.

What is in `output_dir` already is not done again; the results do not depend on how often the run
was stopped.
"""

import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Mesh

from swaa_jax.arguments import told_keywords
from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.provenance import describe_device, describe_versions
from swaa_jax.configs import find_config
from swaa_jax.eval.judging import Judge, make_judge
from swaa_jax.eval.judging.rules import CHOICES
from swaa_jax.eval.report import Evaluation
from swaa_jax.eval.run.answering import resolve_all
from swaa_jax.eval.run.asking import Asking, Cell, LocalAsking
from swaa_jax.eval.run.config import (
    EvalConfig,
    PolicyEntry,
    ServedPolicy,
    Setting,
    TaskEntry,
    read_document,
)
from swaa_jax.eval.run.entries import ModelEntry, RemoteEntry
from swaa_jax.eval.run.loading import (
    describe,
    identity_of,
    load_entry,
    warn_of_difference,
)
from swaa_jax.eval.run.readers import models as several_models
from swaa_jax.eval.run.remote import RemoteModel
from swaa_jax.eval.run.remote_asking import RemoteAsking
from swaa_jax.fields import check_keys, naming, wrong
from swaa_jax.models import CausalLM
from swaa_jax.models.function import Structure
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ProgressLike, ShowProgress, progress_like, show_progress
from swaa_jax.runs import check_writable, fingerprint
from swaa_jax.storage import read_text
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_POLICIES", "evaluate"]

logger = logging.getLogger(__name__)

DEFAULT_POLICIES = ("full", "naive", "instruct-no-train")
"""Of an evaluation that names none."""


@told_keywords()
def evaluate(
    config: "EvalConfig | Mapping[str, object] | PathLike | None" = None,
    *,
    models: Any = None,
    policies: Any = None,
    tasks: Any = None,
    data: Any = None,
    output_dir: PathLike | None = None,
    load: "Callable[[ModelEntry], tuple[CausalLM, PreTrainedTokenizerBase]] | None" = None,
    mesh: Mesh | str | None = None,
    progress: ProgressLike = None,
    **settings: Any,
) -> Evaluation:
    """Ask models under policies, judge the answers, and measure what they cost.

    Args:
        config: what is asked, as an `EvalConfig`, a mapping of its fields or a file; with one, what
            is said by name replaces its fields. None: all is said by name.
        models: a path or name, a loaded model or `(model, tokenizer)`, several in a list, or a dict
            from the names that results have: `{"mine": (model, tok)}`.
        policies: what `load_policy` takes, several in a list or in one text with commas, or a dict
            by name. None: `DEFAULT_POLICIES`.
        tasks: kinds with settings as on the command line, `"ruler,length=1024"`, mappings, or
            objects; one or several.
        data: questions of your own: a file or several, a list of dicts with `prompt` and `answer`,
            a `datasets.Dataset` or a pandas frame; or a dict of these by name.
        output_dir: every answer is kept there, so that the same call goes on where it was stopped,
            and asks only what is new. None: nothing is kept on disk.
        load: gives a local model of the config and its tokenizer; None: `load_entry`.
        mesh: as `load_model` takes it, for models that are loaded here.
        progress: who is told how far it is.
        settings: other fields of `EvalConfig`: thinking, limit, batch_size, temperature, ...; and
            `judge` and `max_new_tokens`, as its constructor takes them.

    Raises:
        ValueError: an unknown setting (the nearest one is named), nothing to ask, a policy that
            does not fit a model, prompts beyond its context, malformed data, a judge that gave no
            verdict (what was judged so far is kept), or a server that does not answer (what was
            answered so far is kept).
        NotImplementedError: servers are to be asked from several processes.
        FileNotFoundError: a checkpoint or a data file that is not there.

    Examples:
        >>> import swaa_jax as swaa
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> done = swaa.evaluate(
        ...     models=(model, tok),
        ...     policies={"full": "full", "mine": "window=64,sinks=4,decode=full"},
        ...     data=[{"prompt": "1 + 1 =", "answer": "2"}],
        ...     max_new_tokens=4,
        ... )  # doctest: +SKIP
        >>> print(done)  # doctest: +SKIP
    """
    progress = progress_like("progress", progress)
    if load is not None and not callable(load):
        raise wrong("load", "a function of a ModelEntry, or None", load, "give models loaded")
    given = {"models": models, "policies": policies, "tasks": tasks, "data": data}
    given["output_dir"] = output_dir
    config = _config(config, {k: v for k, v in given.items() if v is not None} | settings)
    with show_progress("starting", total=1, enabled=progress) as bar:
        if config.output_dir is not None:
            return _run(config, load=load, mesh=mesh, progress=bar.show)
        if jax.process_count() > 1:
            raise ValueError(
                "output_dir: expected a directory that all processes reach, got None with "
                f"{jax.process_count()} processes; give one"
            )
        with tempfile.TemporaryDirectory(prefix="swaa_evaluate_") as place:
            kept = dataclasses.replace(config, output_dir=place)
            done = _run(kept, load=load, mesh=mesh, progress=bar.show)
    return dataclasses.replace(done, config=config)


def _config(config: Any, given: dict[str, Any]) -> EvalConfig:
    """The config that the arguments come to.

    Raises:
        ValueError: something else in the config's place, or what a config has already.
    """
    if isinstance(config, str | os.PathLike):
        path = find_config("eval", config)
        with naming(path):
            config = read_document(read_text(path))
    if isinstance(config, Mapping):
        if "settings" in config and {"models", "policies"} & set(given):
            raise wrong("models", "none with a config that has settings", given.get("models"))
        return EvalConfig.from_dict({**config, **given})
    if config is None:
        asked = several_models("models", given["models"]) if "models" in given else ()
        if any(isinstance(one, ModelEntry) for one in asked):
            given.setdefault("policies", list(DEFAULT_POLICIES))
        given |= {"models": asked} if asked else {}
        return EvalConfig(**given)
    if not isinstance(config, EvalConfig):
        raise ValueError(
            f"config: expected an EvalConfig, a mapping, a file or None, got a "
            f"{type(config).__name__}; a model goes to models=..., records to data=..."
        )
    twice = [name for name in ("models", "policies", "data", "judge") if name in given]
    if twice:
        raise ValueError(
            f"{twice[0]}: expected none with an EvalConfig, which says what is asked, got one; "
            "make the config with it"
        )
    known = [field.name for field in dataclasses.fields(EvalConfig)]
    check_keys("evaluate", given, known)
    return dataclasses.replace(config, **given)


def _run(
    config: EvalConfig,
    *,
    load: "Callable[[ModelEntry], tuple[CausalLM, PreTrainedTokenizerBase]] | None",
    mesh: Mesh | str | None,
    progress: ShowProgress,
) -> Evaluation:
    """Run an evaluation, or what is left of it, in its directory."""
    start = time.perf_counter()
    check_writable("output_dir", config.directory)  # before any work, all that can be told before
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


class _Steps:
    """Adds up finished steps of equal weight and tells `progress`."""

    def __init__(self, progress: ShowProgress, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def show(self, what: str, part: float) -> None:
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
    is_local = "://" not in config.directory
    if settings.get("name") == "llm" and "cache" not in settings and is_local:
        epath.Path(config.directory).mkdir(parents=True, exist_ok=True)
        settings["cache"] = str(epath.Path(config.directory) / "judge_cache.jsonl")
    try:
        return name, make_judge(**settings)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from error
