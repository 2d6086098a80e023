"""Models, policies, tasks and data, however they are given: names, texts, mappings, objects."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from swaa_jax.arguments import is_tokenizer
from swaa_jax.checkpoint import checkpoint_origin
from swaa_jax.documents import named_settings
from swaa_jax.eval.run.entries import (
    Loaded,
    ModelEntry,
    PolicyEntry,
    RemoteEntry,
    TaskEntry,
    name_or_none,
)
from swaa_jax.eval.tasks import QaTask, Task, make_task
from swaa_jax.examples import FORMATS
from swaa_jax.fields import (
    Check,
    from_mapping,
    list_of,
    naming,
    show,
    wrong,
    wrong_kind,
)
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, load_policy, several_policies
from swaa_jax.records import are_files

__all__ = ["data_entries", "models", "policies", "policy_entry", "several", "task_entry", "tasks"]

T = TypeVar("T")

_MODELS = "a checkpoint's path or name, a loaded model, (model, tokenizer), or a dict by name"


def several(item: Check[T]) -> Check[tuple[T, ...]]:
    """A list of at least one item; a value that is not a list becomes a list of it alone."""

    def check(name: str, value: object) -> tuple[T, ...]:
        found = list_of(item)(name, value if isinstance(value, list | tuple) else [value])
        if not found:
            raise wrong(name, "at least one", value)
        return found

    return check


def _some(name: str, found: list[T]) -> tuple[T, ...]:
    if not found:
        raise wrong(name, "at least one", found)
    return tuple(found)


def models(name: str, value: Any) -> tuple[ModelEntry | RemoteEntry, ...]:
    """Models that are asked.

    A path or a mapping of an entry's fields; a loaded model, alone or with its tokenizer; a list of
    these; or a mapping from the names that results have to any of them.
    """
    if isinstance(value, Mapping) and not {"path", "url"} & set(value):
        found = [
            dataclasses.replace(_model(f"{name}[{show(label)}]", one), name=str(label))
            for label, one in value.items()
        ]
        return _some(name, found)
    return several(_model)(name, [value] if _is_pair(value) else value)


def _model(name: str, entry: Any) -> ModelEntry | RemoteEntry:
    if isinstance(entry, ModelEntry | RemoteEntry):
        return entry
    if isinstance(entry, CausalLM):
        return _loaded(name, entry, None)
    if _is_pair(entry):
        return _loaded(name, *entry)
    if isinstance(entry, str | os.PathLike):
        entry = os.fspath(entry)
        if entry.startswith(("http://", "https://")):
            return from_mapping(RemoteEntry, {"url": entry}, name)
        return from_mapping(ModelEntry, {"path": entry}, name)
    if isinstance(entry, Mapping):
        return from_mapping(RemoteEntry if "url" in entry else ModelEntry, entry, name)
    raise wrong_kind(name, _MODELS, entry)


def _is_pair(value: Any) -> bool:
    """Whether it is a model and a tokenizer, in either order."""
    is_two = isinstance(value, list | tuple) and len(value) == 2
    return is_two and any(map(is_tokenizer, value))


def _loaded(name: str, model: Any, tokenizer: Any) -> ModelEntry:
    """The entry of a model in memory."""
    if is_tokenizer(model) and isinstance(tokenizer, CausalLM):
        raise ValueError(
            f"{name}: expected (model, tokenizer), got the tokenizer first; change their order"
        )
    if not isinstance(model, CausalLM):
        raise wrong_kind(name, "(model, tokenizer), the model from load_model", model)
    origin = None if model.source is None else checkpoint_origin(model.source).name
    if tokenizer is None and model.source is None:
        raise ValueError(
            f"{name}: expected (model, tokenizer), since this model was not loaded from a "
            "directory that has one, got the model alone; give both"
        )
    label = None if origin is None else str(origin).rstrip("/").rpartition("/")[2]
    return ModelEntry(
        path=str(origin or "in memory"),
        name=label or "model",
        loaded=Loaded(model=model, tokenizer=tokenizer),
    )


def policies(name: str, value: Any) -> tuple[PolicyEntry | Mapping[str, object], ...]:
    """Policies: one or several in any form of `policy_entry`, several in one text with commas, or a
    mapping from the names that results have to policies.
    """
    found = [
        policy_entry(f"{name}[{at}]", one)
        if label is None
        else _named_policy(f"{name}[{show(label)}]", label, one)
        for at, (label, one) in enumerate(several_policies(name, value))
    ]
    return _some(name, found)


def _named_policy(name: str, label: str, policy: Any) -> PolicyEntry:
    with naming(name):
        return PolicyEntry(name=label, policy=load_policy(policy))


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


def tasks(name: str, value: Any) -> tuple[TaskEntry, ...]:
    """Tasks: one or several in any form of `task_entry`, or a mapping from names to them."""
    if isinstance(value, Mapping) and "task" not in value:
        value = [
            dataclasses.replace(task_entry(f"{name}[{show(label)}]", one), name=str(label))
            for label, one in value.items()
        ]
    return several(task_entry)(name, value)


def task_entry(name: str, entry: Any) -> TaskEntry:
    """A task; or its kind, perhaps with settings, `ruler,length=1024`; or a mapping of these."""
    if isinstance(entry, TaskEntry):
        return entry
    if isinstance(entry, Task):
        return TaskEntry(name=entry.label, task=entry)
    if isinstance(entry, type) and issubclass(entry, Task):
        raise ValueError(f"{name}: expected a task, got the class; write {entry.__name__}(...)")
    fields = named_settings(entry, "task") if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping) or not isinstance(fields.get("task"), str):
        raise wrong(name, "a mapping such as {task: qa, files: mine.jsonl}", entry)
    settings: dict[str, Any] = dict(fields)
    kind = settings.pop("task")
    if kind.endswith((".jsonl", ".json", ".parquet")):
        raise wrong(name, "a task's kind", kind, "questions of your own are data")
    given, judge = settings.pop("name", None), settings.pop("judge", None)
    longest = settings.pop("max_new_tokens", None)
    task = make_task(kind, **settings)
    return TaskEntry(
        name=name_or_none("name", given) or task.label,
        task=task,
        judge={"name": judge} if isinstance(judge, str) else judge,
        max_new_tokens=longest,
    )


def data_entries(name: str, value: Any) -> tuple[TaskEntry, ...]:
    """Questions of one's own as tasks `qa`.

    A file, or several, each of which is a task; records in memory, as `records_of` takes them; or a
    dict from names to either.
    """
    if type(value) is dict and not set(FORMATS.values()) & set(value):
        found = [
            dataclasses.replace(_questions(f"{name}[{show(label)}]", one), name=str(label))
            for label, one in value.items()
        ]
        return _some(name, found)
    is_list = isinstance(value, list | tuple) and are_files(value)
    files = list(value) if is_list else [value]
    entries = [_questions(name, file) for file in files]
    labels = [one.name for one in entries]
    return tuple(
        dataclasses.replace(one, name=f"qa {file}") if labels.count(one.name) > 1 else one
        for one, file in zip(entries, files, strict=True)
    )


def _questions(name: str, value: Any) -> TaskEntry:
    if value is None or isinstance(value, Task | TaskEntry | CausalLM | bool | int):
        advice = "a task goes to tasks" if isinstance(value, Task | TaskEntry) else ""
        expected = "a file, a list of records, a datasets.Dataset or a pandas frame"
        got = value if value is None or isinstance(value, int) else type(value).__name__
        raise wrong(name, expected, got, advice)
    task = QaTask(files=value) if are_files(value) else QaTask(data=value)
    return TaskEntry(name=task.label, task=task)
