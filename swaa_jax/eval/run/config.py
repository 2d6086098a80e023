"""`EvalConfig`: which models, under which policies, are asked what, from one file."""

import dataclasses
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from swaa_jax.documents import parse_yaml, with_overrides
from swaa_jax.eval.run.entries import API_KEY, ModelEntry, RemoteEntry, name_or_none
from swaa_jax.eval.tasks import Task, make_task
from swaa_jax.fields import (
    Check,
    check_fields,
    check_keys,
    from_mapping,
    integer,
    list_of,
    mapping,
    naming,
    one_of,
    or_none,
    path,
    wrong,
)
from swaa_jax.infer import SamplingParams
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.storage import read_text
from swaa_jax.typing import PathLike

__all__ = [
    "EvalConfig",
    "PolicyEntry",
    "ServedPolicy",
    "Setting",
    "TaskEntry",
    "policy_entry",
    "read_document",
    "task_entry",
]

T = TypeVar("T")

_NOTES = ("description", "source")
_WHAT_TO_SAY = (
    "say which checkpoints (models: [...]) under which policies (policies: [full, ...]) are asked "
    "what (tasks: [{task: qa, files: mine.jsonl}]), and where the results go (output_dir)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEntry:
    """A policy, and what results call it."""

    name: str
    policy: AttentionPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """The policy of a server's model, which is the server's to know."""

    name: str = "as served"
    policy: None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task, how its answers are judged, and how long they may be.

    Attributes:
        name: in results; distinct.
        task: the task.
        judge: arguments of `make_judge`; None: the task's own.
        max_new_tokens: of an answer without its thinking; None: the task's own.
    """

    name: str
    task: Task
    judge: Mapping[str, object] | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, judge=or_none(mapping), max_new_tokens=or_none(integer(least=1)))

    @property
    def judge_settings(self) -> dict[str, Any]:
        """What `make_judge` is given; a part of it, without a name, changes the task's own."""
        given = dict(self.judge or {})
        own = dict(self.task.judge)
        return given if given.get("name", own["name"]) != own["name"] else {**own, **given}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Models, each of which is asked under each of the policies.

    A policy's entry may be the reference's configuration, `{swaa_config: {...}}`, which is read
    when the model's depth is known: the reference names layers that a model may lack. A server's
    models have their own policies; a setting of nothing else has none.
    """

    models: tuple[ModelEntry | RemoteEntry, ...]
    policies: tuple[PolicyEntry | Mapping[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.local_models and not self.policies:
            raise ValueError(f"evaluation: expected a value for policies, got none; {_WHAT_TO_SAY}")
        if self.policies and not self.local_models:
            raise ValueError(
                f"policies: expected none where all models are asked by their url, got "
                f"{len(self.policies)}; leave them out, since a server has its own, or add a local "
                "model"
            )
        _distinct("models", [model.label for model in self.models])
        entries = [entry for entry in self.policies if isinstance(entry, PolicyEntry)]
        _distinct("policies", [entry.name for entry in entries])

    @property
    def local_models(self) -> list[ModelEntry]:
        """Those that are loaded here."""
        return [model for model in self.models if isinstance(model, ModelEntry)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingParams):
    """What an evaluation asks; how tokens are drawn is in `SamplingParams`.

    Attributes:
        settings: models x policies.
        tasks: what all of them are asked.
        output_dir: where everything goes; what is there already is not done again.
        thinking: the modes of the chat template's `enable_thinking`.
        max_thinking_tokens: added to an answer's longest length where the model thinks; 0: that
            length holds for thinking and answer together.
        attempts: answers to each sample; more than one wants a temperature.
        seed: of the draws, the resampling, and the choice of shown examples.
        batch_size: prompts run at once, at most, of similar length.
        skip_samples, limit: of each task's samples, the first so many are left out, and at most so
            many are asked; None: all.
        too_long: "error", or "skip": what to do with prompts beyond the model's context. Skipped
            ones are counted in the results.
        baseline: the policy that others are tested against; None: full attention, else the first.
        dtype: of weights and activations; None: float32 on a CPU, bfloat16 elsewhere.
        backend: of attention; see `load_model`.

    Raises:
        ValueError: nothing to ask, names that are there twice, or a value out of range.
    """

    settings: tuple[Setting, ...]
    tasks: tuple[TaskEntry, ...]
    output_dir: str
    thinking: tuple[bool, ...] = (False,)
    max_thinking_tokens: int = 2048
    attempts: int = 1
    seed: int = 0
    batch_size: int = 8
    skip_samples: int = 0
    limit: int | None = None
    too_long: str = "error"
    baseline: str | None = None
    dtype: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            tasks=_several(task_entry),
            output_dir=path,
            thinking=_modes,
            max_thinking_tokens=integer(least=0),
            attempts=integer(least=1),
            seed=integer(least=0),
            batch_size=integer(least=1),
            skip_samples=integer(least=0),
            limit=or_none(integer(least=1)),
            too_long=one_of("error", "skip"),
            dtype=or_none(one_of("bfloat16", "float32", "float16")),
        )
        self.check_attempts(self.attempts)
        _distinct("tasks", [entry.name for entry in self.tasks])
        known: dict[str, ModelEntry | RemoteEntry] = {}
        for model in self.models:
            if known.setdefault(model.label, model) != model:
                key = "path" if isinstance(model, ModelEntry) else "url"
                raise ValueError(
                    f"models: expected distinct names, got {model.label!r} for {model.source} and "
                    f"for {known[model.label].source}; give one a name, {{{key}: ..., name: ...}}"
                )
        if self.remote_models:
            self._check_remote(self.remote_models)

    def _check_remote(self, remote: "Sequence[RemoteEntry]") -> None:
        """Refuses settings that no server takes, and a key that several would be sent.

        Raises:
            ValueError: they are named.
        """
        given = [name for name in ("no_repeat_ngram_size", "suppress_tokens") if vars(self)[name]]
        if given:
            raise ValueError(
                f"{given[0]}: expected nothing with {remote[0].label}, since servers do not take "
                f"it, got {vars(self)[given[0]]}; leave it out, or ask local models alone"
            )
        hosts = {urllib.parse.urlsplit(m.url).netloc for m in remote if m.api_key_env is None}
        if len(hosts) > 1 and os.environ.get(API_KEY):
            raise ValueError(
                f"{API_KEY}: expected one server that it is the key of, got {len(hosts)}; give "
                "each model that needs a key an api_key_env, the name of a variable of its own"
            )

    @property
    def models(self) -> "list[ModelEntry | RemoteEntry]":
        """Of all settings, in their order."""
        return [model for setting in self.settings for model in setting.models]

    @property
    def local_models(self) -> list[ModelEntry]:
        """Those that are loaded here."""
        return [model for model in self.models if isinstance(model, ModelEntry)]

    @property
    def remote_models(self) -> list[RemoteEntry]:
        """Those of servers."""
        return [model for model in self.models if isinstance(model, RemoteEntry)]

    def with_config_overrides(self, overrides: Mapping[str, object]) -> "EvalConfig":
        """The same evaluation of models whose configs have these values, over their own ones.

        Raises:
            ValueError: all models are a server's.
        """
        if overrides and not self.local_models:
            raise ValueError(
                f"config_overrides: expected none where all models are asked by their url, got "
                f"{', '.join(map(str, overrides))}; leave them out"
            )

        def changed(model: ModelEntry | RemoteEntry) -> ModelEntry | RemoteEntry:
            if isinstance(model, RemoteEntry):
                return model
            own = {**model.config_overrides, **overrides}
            return dataclasses.replace(model, config_overrides=own)

        settings = tuple(
            dataclasses.replace(setting, models=tuple(map(changed, setting.models)))
            for setting in self.settings
        )
        return dataclasses.replace(self, settings=settings)

    def without_adapter(self, label: str) -> str:
        """The label of the same checkpoint without adapters, where it is among the models."""
        entries = {m.label: m for m in self.local_models}
        if label not in entries or entries[label].adapter is None:
            return label
        bare = dataclasses.replace(entries[label], adapter=None, name=None)
        same = (
            name for name, entry in entries.items() if dataclasses.replace(entry, name=None) == bare
        )
        return next(same, label)

    def compared_with(self, label: str) -> str:
        """The label of the model whose baseline this one's answers are tested against.

        A local model has its own, or that of the same checkpoint without adapters. A server's model
        is compared with the local one whose tokenizer it has, with the first local one where the
        server renders the same chats itself; else with the first one of a server that is asked
        alike.
        """
        entry = next((m for m in self.remote_models if m.label == label), None)
        if entry is None:
            return self.without_adapter(label)
        alike = [m.label for m in self.local_models if entry.tokenizer in (None, m.path)] or [
            m.label for m in self.remote_models if m.tokenizer == entry.tokenizer
        ]
        return self.without_adapter(alike[0])

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> "EvalConfig":
        """A config from plain data.

        `models` and `policies` are lists, every model under every policy; or `settings` is a list
        of such pairs. A model is a path or a mapping of `ModelEntry`'s fields; a policy is what
        `load_policy` takes, a mapping of its fields perhaps with a `name`; a task a mapping of
        `task` (its kind), the task's own settings, and perhaps `name`, `judge` and
        `max_new_tokens`.

        Raises:
            ValueError: an unknown key (the nearest one is named), or a value that does not fit.
        """
        values = mapping("evaluation", fields)
        values = {key: value for key, value in values.items() if key not in _NOTES}
        if "settings" not in values:
            pair = {key: values.pop(key, None) for key in ("models", "policies")}
            missing = [key for key, value in pair.items() if not value]
            if "models" in missing:
                raise ValueError(
                    f"evaluation: expected a value for {' and '.join(missing)}, got none; "
                    f"{_WHAT_TO_SAY}"
                )
            values["settings"] = [{key: value for key, value in pair.items() if value}]
        readers = {"settings": _several(_setting)}
        return from_mapping(cls, values, "evaluation", readers=readers, advice=_WHAT_TO_SAY)

    @classmethod
    def load(cls, path: PathLike, overrides: Sequence[str] = ()) -> "EvalConfig":
        """Reads a YAML file, or the reference's JSON list of settings, with `KEY=VALUE` overrides.

        The reference's file is a list of `{"swaa_config": {...}, "model_list": [...]}`, or has such
        a list under `settings_list`. It does not say what to ask: add `tasks` and `output_dir` by
        overrides.

        Raises:
            ValueError: the file is malformed, which the message names, or an override is.
            FileNotFoundError: there is no such file.
        """
        text = read_text(path)
        with naming(path):
            return cls.from_dict(with_overrides(read_document(text), overrides))


def read_document(document: str) -> dict[str, Any]:
    """Plain data in this config's form, from YAML or from the reference's JSON."""
    found = parse_yaml(document)  # JSON is YAML
    if isinstance(found, Mapping) and "settings_list" in found:
        rest = {key: value for key, value in found.items() if key != "settings_list"}
        return rest | _of_reference(found["settings_list"])
    if isinstance(found, list) or (isinstance(found, Mapping) and "swaa_config" in found):
        return _of_reference(found)
    return mapping("evaluation", found)


def _of_reference(entries: Any) -> dict[str, object]:
    """The settings of the paper's reference code."""

    def setting(name: str, entry: object) -> dict[str, object]:
        if not isinstance(entry, Mapping) or "swaa_config" not in entry:
            raise wrong(
                name, "{swaa_config: ..., model_list: [...]} as in the reference code", entry
            )
        check_keys(name, entry, ("swaa_config", "model_list"))
        configs = entry["swaa_config"]
        return {
            "models": entry.get("model_list") or [],
            "policies": [
                {"swaa_config": one}
                for one in ([configs] if isinstance(configs, Mapping) else configs)
            ],
        }

    return {"settings": list(_several(setting)("settings", entries))}


def policy_entry(name: str, entry: Any) -> PolicyEntry | Mapping[str, object]:
    """A policy in any form that `load_policy` reads; or the reference's configuration."""
    if isinstance(entry, PolicyEntry):
        return entry
    if isinstance(entry, Mapping) and "swaa_config" in entry:
        AttentionPolicy.from_swaa_config(entry)  # what is wrong with it shows now
        return dict(entry)
    fields = dict(entry) if isinstance(entry, Mapping) else entry
    given = fields.pop("name", None) if isinstance(fields, dict) else None
    with naming(name):
        policy = load_policy(fields)
    if isinstance(entry, str) and "=" not in entry:
        given = entry
    return PolicyEntry(name=str(given or policy), policy=policy)


def task_entry(name: str, entry: object) -> TaskEntry:
    """A task from its kind, or from a mapping of its kind and settings."""
    if isinstance(entry, TaskEntry):
        return entry
    fields = {"task": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping) or not isinstance(fields.get("task"), str):
        raise wrong(name, "a mapping such as {task: qa, files: mine.jsonl}", entry)
    settings: dict[str, Any] = dict(fields)
    kind = settings.pop("task")
    given, judge = settings.pop("name", None), settings.pop("judge", None)
    longest = settings.pop("max_new_tokens", None)
    task = make_task(kind, **settings)
    return TaskEntry(
        name=name_or_none("name", given) or task.label,
        task=task,
        judge={"name": judge} if isinstance(judge, str) else judge,
        max_new_tokens=longest,
    )


def _setting(name: str, entry: object) -> Setting:
    if isinstance(entry, Setting):
        return entry
    readers = {"models": _several(_model), "policies": _several(policy_entry)}
    return from_mapping(Setting, entry, name, readers=readers)


def _model(name: str, entry: object) -> ModelEntry | RemoteEntry:
    if isinstance(entry, ModelEntry | RemoteEntry):
        return entry
    if isinstance(entry, Mapping) and "url" in entry:
        return from_mapping(RemoteEntry, entry, name)
    if isinstance(entry, str) and entry.startswith(("http://", "https://")):
        return from_mapping(RemoteEntry, {"url": entry}, name)
    return from_mapping(ModelEntry, {"path": entry} if isinstance(entry, str) else entry, name)


def _several(item: Check[T]) -> Check[tuple[T, ...]]:
    """A list of at least one item; a value that is not a list becomes a list of it alone."""

    def check(name: str, value: object) -> tuple[T, ...]:
        found = list_of(item)(name, value if isinstance(value, list | tuple) else [value])
        if not found:
            raise wrong(name, "at least one", value)
        return found

    return check


def _modes(name: str, value: Any) -> tuple[bool, ...]:
    modes = value if isinstance(value, list | tuple) else [value]
    if not modes or not all(isinstance(mode, bool) for mode in modes):
        raise wrong(name, "true, false or a list of both", value)
    return tuple(dict.fromkeys(modes))


def _distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{what}: expected distinct names, got {name!r} twice; give one of them a name of "
                "its own (name: ...)"
            )
