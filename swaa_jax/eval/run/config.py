"""`EvalConfig`: which models, under which policies, are asked what, from one file."""

import dataclasses
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_jax.arguments import told_keywords
from swaa_jax.documents import named_settings, parse_yaml, with_overrides
from swaa_jax.eval.run.entries import (
    API_KEY,
    ModelEntry,
    PolicyEntry,
    RemoteEntry,
    ServedPolicy,
    TaskEntry,
)
from swaa_jax.eval.run.readers import (
    data_entries,
    models,
    policies,
    policy_entry,
    several,
    task_entry,
    tasks,
)
from swaa_jax.fields import (
    check_fields,
    check_keys,
    from_mapping,
    integer,
    mapping,
    naming,
    one_of,
    or_none,
    path,
    set_field,
    wrong,
)
from swaa_jax.infer import SamplingParams
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

_NOTES = ("description", "source")
_SHORTER = ("models", "policies", "data", "judge", "max_new_tokens")
_WHAT_TO_SAY = (
    "say which checkpoints (models: [...]) under which policies (policies: [full, ...]) are asked "
    "what (data: mine.jsonl, or tasks: [{task: ruler, length: 4096}])"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Models, each of which is asked under each of the policies.

    A policy's entry may be the reference's configuration, `{swaa_config: {...}}`, which is read
    when the model's depth is known: the reference names layers that a model may lack. A server's
    models have their own policies; a setting of nothing else has none.

    Examples:
        >>> setting = Setting(models="tiny-retriever", policies="full,window=64")
        >>> [model.label for model in setting.models], [one.name for one in setting.policies]
        (['tiny-retriever'], ['full', 'window=64'])
    """

    models: tuple[ModelEntry | RemoteEntry, ...]
    policies: tuple[PolicyEntry | Mapping[str, object], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, models=models, policies=_policies)
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


@told_keywords()
@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class EvalConfig(SamplingParams):
    """What an evaluation asks; how tokens are drawn is in `SamplingParams`.

    Attributes:
        settings: models x policies.
        tasks: what all of them are asked.
        output_dir: where everything goes; what is there already is not done again. None: nothing is
            kept on disk.
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
        ValueError: nothing to ask, names that are there twice, an unknown field (the nearest one is
            named), or a value out of range.

    Examples:
        >>> config = EvalConfig(
        ...     models="tiny-retriever", policies="full,window=64", tasks="ruler,length=512"
        ... )
        >>> [entry.name for entry in config.settings[0].policies]
        ['full', 'window=64']
    """

    settings: tuple[Setting, ...]
    tasks: tuple[TaskEntry, ...]
    output_dir: str | None = None
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

    def __init__(
        self,
        *,
        models: Any = None,
        policies: Any = None,
        data: Any = None,
        judge: Any = None,
        max_new_tokens: int | None = None,
        **fields: Any,
    ):
        """Takes the fields, and in place of some of them what is shorter to write.

        Args:
            models, policies: in place of `settings`: every model under every policy. A model is a
                path or a name, `(model, tokenizer)` of loaded ones, a mapping of `ModelEntry`'s
                fields, or of a server's; a policy is what `load_policy` takes. Several are a list,
                or a dict from the names that results have.
            data: questions of one's own, asked as tasks `qa` before `tasks`: a file or several, a
                list of records, a `datasets.Dataset`, a pandas frame, or a dict of these by name.
            judge: of all tasks, in place of their own: a name, with settings as in
                "regex,which=last", or a mapping.
            max_new_tokens: of an answer without its thinking, of every task whose entry does not
                say it.
            fields: see the class.
        """
        every = dataclasses.fields(self)
        known = [field.name for field in every]
        check_keys("evaluation", fields, [*_SHORTER, *known])
        if "settings" not in fields:
            pair = {"models": models, "policies": policies}
            given = {key: value for key, value in pair.items() if _is_given(value)}
            if "models" not in given:
                missing = [key for key in pair if key not in given]
                raise ValueError(
                    f"evaluation: expected a value for {' and '.join(missing)}, got none; "
                    f"{_WHAT_TO_SAY}"
                )
            fields["settings"] = [given]
        elif models is not None or policies is not None:
            raise ValueError(
                "settings: expected none with models and policies, which are a setting, got both; "
                "leave one out"
            )
        asked = _asked(data, fields.get("tasks"), judge=judge, max_new_tokens=max_new_tokens)
        if not asked:
            raise ValueError(
                f"evaluation: expected a value for tasks or data, got none; {_WHAT_TO_SAY}"
            )
        fields["tasks"] = asked
        for field in every:
            set_field(self, field.name, fields.get(field.name, field.default))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            settings=_settings,
            output_dir=or_none(path),
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
        policies = [policy for setting in self.settings for policy in setting.policies]
        named = [entry.name for entry in policies if isinstance(entry, PolicyEntry)]
        if self.baseline is not None and named and len(named) == len(policies):
            one_of(*dict.fromkeys(named))("baseline", self.baseline)
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
    def directory(self) -> str:
        """The `output_dir` of an evaluation that runs, which has one, if only for that long."""
        assert self.output_dir is not None
        return self.output_dir

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
        """A config from plain data: what the constructor takes, in a mapping.

        `settings` is a list of `{models: ..., policies: ...}`. A `description` and a `source` are
        left out.

        Raises:
            ValueError: an unknown key (the nearest one is named), or a value that does not fit.
        """
        values = mapping("evaluation", fields)
        return cls(**{key: value for key, value in values.items() if key not in _NOTES})

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

    return {"settings": list(several(setting)("settings", entries))}


def _setting(name: str, entry: object) -> Setting:
    return entry if isinstance(entry, Setting) else from_mapping(Setting, entry, name)


def _settings(name: str, value: object) -> tuple[Setting, ...]:
    return () if value == () else several(_setting)(name, value)


def _policies(name: str, value: Any) -> tuple[PolicyEntry | Mapping[str, object], ...]:
    return policies(name, value) if _is_given(value) else ()


def _is_given(value: Any) -> bool:
    return not (value is None or (isinstance(value, str | list | tuple | dict) and not value))


def _asked(
    data: Any, given: Any, *, judge: Any, max_new_tokens: int | None
) -> tuple[TaskEntry, ...]:
    """The tasks: questions of one's own, then the others."""
    found = data_entries("data", data) if data is not None else ()
    found += tasks("tasks", given) if _is_given(given) else ()
    if max_new_tokens is not None:
        found = tuple(
            dataclasses.replace(one, max_new_tokens=one.max_new_tokens or max_new_tokens)
            for one in found
        )
    if judge is None:
        return found
    if callable(judge):
        advice = "a task of your own has it: docs/add-a-task.md; distill takes functions"
        raise wrong("judge", "a judge's name, or a mapping of it and its settings", judge, advice)
    judge = named_settings(judge, "name") if isinstance(judge, str) else mapping("judge", judge)
    return tuple(dataclasses.replace(one, judge=judge) for one in found)


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
