"""Finds and reads the shipped YAML: `configs/` in a checkout, `swaa_jax/_configs` in the wheel.

A policy file, ``configs/policies/NAME.yaml``, is a mapping of the fields of `AttentionPolicy`
(those left out keep their defaults) and up to three notes that change nothing:

    description: what the policy is for, in a sentence
    source: where it comes from, and the evidence
    models: the models that it was measured on, a list

Slices of layers are quoted: ``full_attention_layers: "1::2"``.
"""

import dataclasses
import difflib
import os
import pathlib
from typing import Any

from etils import epath

from swaa_jax._policy_fields import parse_yaml
from swaa_jax.policy import AttentionPolicy
from swaa_jax.typing import PathLike

__all__ = ["PolicyFile", "config_path", "list_configs", "load_policy", "load_policy_file"]

_PACKAGE = pathlib.Path(__file__).parent
# An editable install and a checkout have configs/ beside the package, a wheel has it inside.
_ROOTS = (_PACKAGE / "_configs", _PACKAGE.parent / "configs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """A policy and the notes of its file.

    Attributes:
        name: name among the shipped policies, or the path that was read.
        policy: the policy.
        description: what it is for.
        source: where it comes from.
        models: the models that it was measured on.
    """

    name: str
    policy: AttentionPolicy
    description: str = ""
    source: str = ""
    models: tuple[str, ...] = ()


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
            models=_models(document.get("models", ())),
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


def _models(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"models must be a list of names; got {value!r}.")
    return tuple(value)
