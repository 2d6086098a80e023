"""What a run is, and whether a directory is that run's.

A run that can be stopped and goes on later writes down what its results depend on, its *identity*:
nested plain data. The same command finds it there and goes on; another one is told what differs.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath

from swaa_jax import runtime, storage
from swaa_jax.fields import show, wrong

__all__ = ["check_writable", "claim", "differences", "fingerprint"]

_SHOWN = 6


def fingerprint(content: object, *, digits: int = 16) -> str:
    """Hexadecimal digits that differ when the content (JSON's types) does.

    What is not JSON's is taken by its text.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What differs between two identities, in words; nothing where they are the same.

    What is absent is as what is null, so that an identity may gain fields.

    >>> differences({"lora": {"rank": 2}, "seed": 0}, {"lora": {"rank": 3}, "seed": 0})
    'lora.rank was 2 and is 3'
    """
    old, new = _flat(before), _flat(now)
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    shown = [
        f"{show(name)[1:-1]} was {_show(old, name)} and is {_show(new, name)}"
        for name in names[:_SHOWN]
    ]
    if len(names) > _SHOWN:
        shown.append(f"and {len(names) - _SHOWN} more")
    return "; ".join(shown)


def check_writable(name: str, directory: epath.PathLike | None) -> None:
    """Refuses a local path that no files can be written in, without making anything yet.

    Args:
        name: what the path is called, for messages.
        directory: the path; None is fine.

    Raises:
        ValueError: it is not a directory and cannot become one, or cannot be written.
    """
    if directory is None or not storage.is_local(directory):
        return
    nearest = pathlib.Path(directory).expanduser().absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"{name}: expected a directory that can be written, got {os.fspath(directory)}, and "
            f"{nearest} is {'not writable' if nearest.is_dir() else 'a file'}; give another one"
        )


def claim(
    directory: epath.PathLike,
    identity: Mapping[str, object],
    *,
    file: str,
    what: str,
    optional: Sequence[str] = (),
) -> None:
    """Makes the directory this run's, or sees that it is.

    Every process of a run calls it; process 0 writes.

    Args:
        directory: is made if it is not there.
        identity: all that the results depend on, as JSON's types.
        file: its name in the directory.
        what: the results, for messages: ``"the answers"``.
        optional: fields that an older version did not write; where they are absent they are not
            compared.

    Raises:
        ValueError: it is another run's; the message names what differs.
    """
    directory = epath.Path(directory)
    path = directory / file
    if path.exists():
        before = storage.read_json(path)
        if not isinstance(before, Mapping):
            expected = "a JSON object, as a run writes it"
            raise wrong(str(path), expected, before, "remove the directory, or pass another one")
        now = json.loads(json.dumps(identity))  # as it was read
        now = {name: now[name] for name in now if name in before or name not in optional}
        if differing := differences(before, now):
            raise ValueError(
                f"{directory}: expected a new directory or {what} of this run, got {what} of "
                f"another run ({differing}); pass another directory, or what that run was started "
                "with"
            )
    elif runtime.is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_json_atomic(path, dict(identity))
    runtime.wait_for_all(f"claim {file}")


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Values by their dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _show(values: Mapping[str, object], name: str) -> str:
    return show(values[name]) if name in values else "absent"
