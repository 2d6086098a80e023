"""Finds and reads the shipped YAML: `configs/` in a checkout, `swaa_jax/_configs` in the wheel.

A policy file, ``configs/policies/NAME.yaml``, is a mapping of the fields of `AttentionPolicy`
(those left out keep their defaults) and up to four notes that change nothing:

    description: what the policy is for, in a sentence
    source: where it comes from
    needs: {training: true, thinking: true, prefer: quality}; for whom it is, see `Needs`
    evidence: a list of {model: ..., task: ..., score: ..., full: ...}, see `Evidence`

Slices of layers are quoted: ``full_attention_layers: "1::2"``.
"""

import dataclasses
import difflib
import os
import pathlib
from typing import Any, Literal

from etils import epath

from swaa_jax._policy_fields import parse_yaml
from swaa_jax.policy import AttentionPolicy
from swaa_jax.typing import PathLike

__all__ = [
    "Evidence",
    "Needs",
    "PolicyFile",
    "config_path",
    "list_configs",
    "load_policy",
    "load_policy_file",
]

_PACKAGE = pathlib.Path(__file__).parent
# An editable install and a checkout have configs/ beside the package, a wheel has it inside.
_ROOTS = (_PACKAGE / "_configs", _PACKAGE.parent / "configs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """For whom a policy is; None: it does not matter. All None: for comparison, no recipe.

    Attributes:
        training: whether the model is fine-tuned under it.
        thinking: whether the model thinks before it answers.
        prefer: "quality" or "efficiency".
    """

    training: bool | None = None
    thinking: bool | None = None
    prefer: Literal["quality", "efficiency"] | None = None

    def __post_init__(self) -> None:
        for name in ("training", "thinking"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}.")
        if self.prefer not in (None, "quality", "efficiency"):
            raise ValueError(f"prefer must be quality or efficiency; got {self.prefer!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A published score under a policy.

    Attributes:
        model: the name of the model that was measured.
        task: what it was asked.
        score: in percent.
        full: the same model's under full attention, fine-tuned where the policy is for that.
    """

    model: str
    task: str
    score: float
    full: float

    def __post_init__(self) -> None:
        for name in ("model", "task"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text; got {getattr(self, name)!r}.")
        for name in ("score", "full"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{name} must be a percentage, 0 to 100; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """A policy and the notes of its file.

    Attributes:
        name: name among the shipped policies, or the path that was read.
        policy: the policy.
        description: what it is for.
        source: where it comes from.
        needs: for whom it is.
        evidence: published scores.
    """

    name: str
    policy: AttentionPolicy
    description: str = ""
    source: str = ""
    needs: Needs = Needs()
    evidence: tuple[Evidence, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it was measured on."""
        return tuple(dict.fromkeys(one.model for one in self.evidence))


def list_configs(kind: str) -> list[str]:
    """Names of the shipped configs of a kind, sorted.

    Args:
        kind: a folder of `configs/`, such as ``"policies"``.

    Raises:
        ValueError: there is no such folder; the message lists them.

    Examples:
        >>> [name for name in list_configs("policies") if name in ("full", "naive")]
        ['full', 'naive']
    """
    folder = _folder(kind)
    files = folder.rglob("*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)


def config_path(kind: str, name: str) -> pathlib.Path:
    """The path of a shipped config.

    Args:
        kind: a folder of `configs/`, such as ``"policies"``.
        name: file name without ``.yaml``, with ``/`` for folders below.

    Raises:
        ValueError: there is none; the message suggests the nearest name and lists them all.

    Examples:
        >>> config_path("policies", "naive").name
        'naive.yaml'
    """
    names = list_configs(kind)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"No {kind} config is named {name!r}.{hint} There are: {', '.join(names)}."
        )
    return _folder(kind) / f"{name}.yaml"


def load_policy(name_or_path: PathLike) -> AttentionPolicy:
    """A policy by the name of a shipped config, or from a YAML or JSON file.

    What ends in ``.yaml``, ``.yml`` or ``.json`` is a path, anything else a name.

    Raises:
        ValueError: no such name or a malformed file.
        FileNotFoundError: no such file.

    Examples:
        >>> print(load_policy("full"))
        full attention
    """
    return load_policy_file(name_or_path).policy


def load_policy_file(name_or_path: PathLike) -> PolicyFile:
    """The same with the file's notes.

    Raises:
        ValueError: no such name or a malformed file.
        FileNotFoundError: no such file.
    """
    name = os.fspath(name_or_path)
    if name.endswith((".yaml", ".yml", ".json")):
        path = epath.Path(name)
    else:
        path = config_path("policies", name)
    policy = AttentionPolicy.load(path)
    try:
        document = parse_yaml(path.read_text())  # JSON is YAML
        return PolicyFile(
            name=name,
            policy=policy,
            description=_note(document, "description"),
            source=_note(document, "source"),
            needs=_record(Needs, document.get("needs", {}), "needs"),
            evidence=_evidence(document.get("evidence", [])),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder(kind: str) -> pathlib.Path:
    for root in _ROOTS:
        if root.is_dir():
            if kind and (root / kind).is_dir():
                return root / kind
            kinds = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise ValueError(f"No configs of kind {kind!r}. There are: {', '.join(kinds)}.")
    raise ValueError(f"No configs are installed: looked in {' and '.join(map(str, _ROOTS))}.")


def _note(document: dict[str, Any], key: str) -> str:
    value = document.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text; got {value!r}.")
    return " ".join(value.split())


def _evidence(value: Any) -> tuple[Evidence, ...]:
    if not isinstance(value, list):
        raise ValueError(f"evidence must be a list; got {value!r}.")
    return tuple(
        _record(Evidence, one, f"evidence, entry {number}") for number, one in enumerate(value, 1)
    )


def _record(kind: Any, value: Any, where: str) -> Any:
    """`kind` from a mapping of its fields."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(value, dict) or not set(value) <= set(names):
        raise ValueError(
            f"{where} must be a mapping with keys of {', '.join(names)}; got {value!r}."
        )
    try:
        return kind(**value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
