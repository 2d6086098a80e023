"""`EvalConfig`: which models, under which policies, are asked what, from one file."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from swaa_jax._policy_fields import check_keys, describe, field_setter, integer, parse_yaml
from swaa_jax.eval.tasks import Task, make_task
from swaa_jax.fields import with_overrides
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.typing import PathLike

__all__ = ["EvalConfig", "ModelEntry", "PolicyEntry", "Setting", "TaskEntry", "policy_entry"]

_NOTES = ("description", "source")
_DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A checkpoint that is asked.

    Attributes:
        path: a directory, a hub id, gs://... or a shipped model.
        name: in results; None: the path's last part, with the adapter's.
        adapter: LoRA adapters in PEFT's layout, merged into it.
        revision: of a hub id.
        config_overrides: as `load_model` takes them (YaRN beyond 32k, say).
    """

    path: str
    name: str | None = None
    adapter: str | None = None
    revision: str | None = None
    config_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"models: expected a checkpoint's path, got {describe(self.path)}.")
        if self.name is not None:
            field_setter(self)("name", str(self.name))

    @property
    def label(self) -> str:
        """Its name in results."""
        if self.name:
            return self.name
        last = self.path.rstrip("/").rpartition("/")[2]
        return last if self.adapter is None else f"{last} + {epath.Path(self.adapter).name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEntry:
    """A policy, and what results call it."""

    name: str
    policy: AttentionPolicy


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
    judge: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None

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
    when the model's depth is known: the reference names layers that a model may lack.
    """

    models: tuple[ModelEntry, ...]
    policies: tuple[PolicyEntry | Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What an evaluation asks.

    Attributes:
        settings: models x policies.
        tasks: what all of them are asked.
        output_dir: where everything goes; what is there already is not done again.
        thinking: the modes of the chat template's `enable_thinking`.
        max_thinking_tokens: added to an answer's longest length where the model thinks; 0: that
            length holds for thinking and answer together.
        attempts: answers to each sample; more than one wants a temperature.
        temperature, top_k, top_p: how tokens are drawn; 0 is greedy.
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
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 8
    skip_samples: int = 0
    limit: int | None = None
    too_long: str = "error"
    baseline: str | None = None
    dtype: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        put = field_setter(self)
        for name, minimum in (
            *(("attempts", 1), ("batch_size", 1)),
            *(("max_thinking_tokens", 0), ("skip_samples", 0)),
        ):
            put(name, integer(name, getattr(self, name), minimum=minimum))
        if self.limit is not None:
            put("limit", integer("limit", self.limit, minimum=1))
        if self.attempts > 1 and not self.temperature:
            raise ValueError(
                f"attempts: expected 1 at temperature 0, where all answers are the same, got "
                f"{self.attempts}; set temperature, as in temperature=1."
            )
        if self.too_long not in ("error", "skip"):
            raise ValueError(
                f'too_long: expected "error" or "skip"; got {describe(self.too_long)}.'
            )
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(
                f"dtype: expected one of {', '.join(_DTYPES)}; got {describe(self.dtype)}."
            )
        if not self.thinking or not all(isinstance(mode, bool) for mode in self.thinking):
            raise ValueError(
                f"thinking: expected true, false or a list of both; got {describe(self.thinking)}."
            )
        put("thinking", tuple(dict.fromkeys(self.thinking)))
        known: dict[str, ModelEntry] = {}
        for model in (model for setting in self.settings for model in setting.models):
            if known.setdefault(model.label, model) != model:
                raise ValueError(
                    f"models: expected distinct names, got {model.label!r} for {model.path} and "
                    f"for {known[model.label].path}; give one a name, {{path: ..., name: ...}}."
                )
        if not self.tasks:
            raise ValueError("tasks: expected at least one, got none.")
        _check_distinct("tasks", [entry.name for entry in self.tasks])

    def without_adapter(self, label: str) -> str:
        """The label of the same checkpoint without adapters, where it is among the models."""
        entries = {m.label: m for setting in self.settings for m in setting.models}
        if label not in entries or entries[label].adapter is None:
            return label
        bare = dataclasses.replace(entries[label], adapter=None, name=None)
        same = (
            name for name, entry in entries.items() if dataclasses.replace(entry, name=None) == bare
        )
        return next(same, label)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "EvalConfig":
        """A config from plain data.

        `models` and `policies` are lists, every model under every policy; or `settings` is a list
        of such pairs. A model is a path or a mapping of `ModelEntry`'s fields; a policy a shipped
        name, a file, or a mapping of `AttentionPolicy`'s fields with perhaps a `name`; a task a
        mapping of `task` (its kind), the task's own settings, and perhaps `name`, `judge` and
        `max_new_tokens`.

        Raises:
            ValueError: an unknown key (the nearest one is named), or a value that does not fit.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"An evaluation's config is a mapping; got {describe(fields)}.")
        fields = {key: value for key, value in fields.items() if key not in _NOTES}
        known = [field.name for field in dataclasses.fields(cls)] + ["models", "policies"]
        check_keys(fields, known, what="evaluation's config")
        missing = [name for name in ("tasks", "output_dir") if not fields.get(name)]
        if "settings" not in fields:
            missing += [name for name in ("models", "policies") if not fields.get(name)]
        if missing:
            raise ValueError(
                f"The evaluation's config has no {' and no '.join(missing)}. Say which checkpoints "
                "(models: [...]) under which policies (policies: [full, ...]) are asked what "
                "(tasks: [{task: qa, files: mine.jsonl}]), and where the results go (output_dir)."
            )
        built = {k: v for k, v in fields.items() if k not in ("models", "policies")}
        settings = fields.get("settings") or [
            {"models": fields["models"], "policies": fields["policies"]}
        ]
        built["settings"] = tuple(_setting(entry) for entry in _list("settings", settings))
        built["tasks"] = tuple(task_entry(entry) for entry in _list("tasks", fields["tasks"]))
        if "thinking" in fields:
            modes = fields["thinking"]
            built["thinking"] = tuple(modes) if isinstance(modes, list | tuple) else (modes,)
        return cls(**built)

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
        text = epath.Path(path).read_text()
        try:
            return cls.from_dict(with_overrides(read_document(text), overrides))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def read_document(text: str) -> dict[str, Any]:
    """Plain data in this config's form, from YAML or from the reference's JSON."""
    document = parse_yaml(text)  # JSON is YAML
    if isinstance(document, Mapping) and "settings_list" in document:
        rest = {key: value for key, value in document.items() if key != "settings_list"}
        return {**rest, **read_document(json.dumps(document["settings_list"]))}
    if isinstance(document, Mapping) and "swaa_config" in document:
        document = [document]
    if isinstance(document, Sequence) and not isinstance(document, str):
        settings = []
        for number, entry in enumerate(document):
            if not isinstance(entry, Mapping) or "swaa_config" not in entry:
                raise ValueError(
                    f"setting {number}: expected {{swaa_config: ..., model_list: [...]}} as in the "
                    f"paper's reference code, got {describe(entry)}."
                )
            check_keys(entry, ("swaa_config", "model_list"), what="SWAA setting")
            configs = entry["swaa_config"]
            settings.append(
                {
                    "models": entry.get("model_list") or [],
                    "policies": [
                        {"swaa_config": one}
                        for one in ([configs] if isinstance(configs, Mapping) else configs)
                    ],
                }
            )
        return {"settings": settings}
    if not isinstance(document, Mapping):
        raise ValueError(f"An evaluation's config is a mapping; got {describe(document)}.")
    return dict(document)


def policy_entry(entry: Any) -> PolicyEntry | Mapping[str, Any]:
    """A policy from a shipped name, a file, or fields."""
    if isinstance(entry, PolicyEntry):
        return entry
    if isinstance(entry, str):
        policy = load_policy(entry)
        return PolicyEntry(name=str(policy) if "=" in entry else entry, policy=policy)
    if isinstance(entry, AttentionPolicy):
        return PolicyEntry(name=str(entry), policy=entry)
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"policies: expected a name, a file or a mapping of fields, got {describe(entry)}."
        )
    if "swaa_config" in entry:
        AttentionPolicy.from_swaa_config(entry)  # what is wrong with it shows now
        return dict(entry)
    fields = dict(entry)
    name = fields.pop("name", None)
    policy = AttentionPolicy.from_dict(fields)
    return PolicyEntry(name=str(name or policy), policy=policy)


def task_entry(entry: Any) -> TaskEntry:
    """A task from its kind and settings."""
    if isinstance(entry, TaskEntry):
        return entry
    if isinstance(entry, str):
        entry = {"task": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("task"), str):
        raise ValueError(
            f"tasks: expected a mapping such as {{task: qa, files: mine.jsonl}}, got "
            f"{describe(entry)}."
        )
    fields = dict(entry)
    kind, own = fields.pop("task"), {}
    for key in ("name", "judge", "max_new_tokens"):
        if key in fields:
            own[key] = fields.pop(key)
    if own.get("name") is None:
        own.pop("name", None)
    else:
        own["name"] = str(own["name"])
    if isinstance(own.get("judge"), str):
        own["judge"] = {"name": own["judge"]}
    if own.get("max_new_tokens") is not None:
        own["max_new_tokens"] = integer("max_new_tokens", own["max_new_tokens"], minimum=1)
    task = make_task(kind, **fields)
    return TaskEntry(task=task, **{"name": task.label, **own})


def _setting(entry: Any) -> Setting:
    if isinstance(entry, Setting):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"settings: expected mappings, got {describe(entry)}.")
    check_keys(entry, ("models", "policies"), what="evaluation's setting")
    setting = Setting(
        models=tuple(_model(one) for one in _list("models", entry.get("models"))),
        policies=tuple(policy_entry(one) for one in _list("policies", entry.get("policies"))),
    )
    _check_distinct("models", [model.label for model in setting.models])
    names = [entry.name for entry in setting.policies if isinstance(entry, PolicyEntry)]
    _check_distinct("policies", names)
    return setting


def _model(entry: Any) -> ModelEntry:
    if isinstance(entry, ModelEntry):
        return entry
    if isinstance(entry, str):
        return ModelEntry(path=entry)
    if not isinstance(entry, Mapping):
        raise ValueError(f"models: expected a path or a mapping, got {describe(entry)}.")
    known = [field.name for field in dataclasses.fields(ModelEntry)]
    check_keys(entry, known, what="model's entry")
    if "path" not in entry:
        raise ValueError(f"models: expected a path in each entry, got {dict(entry)}.")
    return ModelEntry(**entry)


def _list(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}: expected a list of at least one, got {describe(value)}.")
    return value


def _check_distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{what}: expected distinct names, got {name!r} twice; give one of them a name of "
                "its own (name: ...)."
            )
