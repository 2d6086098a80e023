"""Finds the shipped YAML: `configs/` in a checkout, `swaa_jax/_configs` in the wheel."""

import os
import pathlib

from swaa_jax.fields import describe, nearest, one_line, show
from swaa_jax.typing import PathLike

__all__ = ["config_path", "find_config", "list_configs"]

_ENDINGS = (".yaml", ".yml", ".json")
_PACKAGE = pathlib.Path(__file__).parent
# An editable install and a checkout have configs/ beside the package, a wheel has it inside.
_ROOTS = (_PACKAGE / "_configs", _PACKAGE.parent / "configs")


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


def config_path(kind: str, name: str, *, called: str | None = None) -> pathlib.Path:
    """The path of a shipped config.

    Args:
        kind: a folder of `configs/`, such as ``"policies"``.
        name: file name without ``.yaml``, with ``/`` for folders below.
        called: what the message calls the name; default: the kind.

    Raises:
        ValueError: there is none; the message suggests the nearest name and lists them all.

    Examples:
        >>> config_path("policies", "naive").name
        'naive.yaml'
    """
    names = list_configs(kind)
    if name not in names:
        raise ValueError(
            f"{called or kind}: expected the name of a shipped config, {', '.join(names)}, got "
            f"{describe(name)}{nearest(name, names)}"
        )
    return _folder(kind) / f"{name}.yaml"


def find_config(
    kind: str, name_or_path: PathLike, *, called: str | None = None, advice: str = ""
) -> PathLike:
    """A path as it is, and the path of a shipped config by its name.

    What ends in ``.yaml``, ``.yml`` or ``.json`` is a path, anything else a name.

    Args:
        kind: a folder of `configs/`, such as ``"policies"``.
        name_or_path: what was given.
        called: what the message calls it; default: the kind.
        advice: what else may be written where no config has the name.

    Raises:
        ValueError: there is no shipped config of that name; a file that is meant is named.
        FileNotFoundError: there is no such local file; one of another ending is named.

    Examples:
        >>> os.path.basename(find_config("policies", "naive"))
        'naive.yaml'
        >>> find_config("policies", "mine.yaml")
        Traceback (most recent call last):
        FileNotFoundError: mine.yaml: expected a file that is there, got none; check the path
    """
    name = os.fspath(name_or_path)
    stem, ending = os.path.splitext(name)
    others = [f"{stem}{one}" for one in _ENDINGS if one != ending and os.path.isfile(stem + one)]
    if ending in _ENDINGS:
        if "://" not in name and not os.path.exists(name):
            beside = ([f"say {others[0]}, which is"] if others else []) + ["check the path"]
            raise FileNotFoundError(
                f"{one_line(name)}: expected a file that is there, got none; {beside[0]}"
            )
        return name_or_path
    try:
        return config_path(kind, name, called=called)
    except ValueError as error:
        beside = [f"{name}{one}" for one in _ENDINGS if os.path.isfile(name + one)]
        if beside:
            advice = f"for the file say {beside[0]}"
        elif os.path.exists(name):
            what = "a directory" if os.path.isdir(name) else "a file of another ending"
            expected = f"the name of a shipped config, or a file that ends in {', '.join(_ENDINGS)}"
            told = f"{kind}: expected {expected}, got {show(name)}, which is {what}"
            raise ValueError(f"{told}{advice and f'; {advice}'}") from error
        raise ValueError(f"{error}{advice and f'; {advice}'}") from error


def _folder(kind: str) -> pathlib.Path:
    for root in _ROOTS:
        if root.is_dir():
            if kind and (root / kind).is_dir():
                return root / kind
            kinds = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise ValueError(f"configs: expected one of {', '.join(kinds)}, got {describe(kind)}")
    raise ValueError(
        f"configs: expected shipped ones in {' or '.join(map(str, _ROOTS))}, got none; install "
        "swaa_jax again"
    )
