"""Paths, and files that are written whole or not at all; `directories.py` does it for directories.

Every path goes through `etils.epath`, so `gs://` works where its filesystem package is installed.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from swaa_jax.documents import parse_json
from swaa_jax.fields import first_of, naming, show

__all__ = [
    "CheckpointError",
    "check_space",
    "forget_listings",
    "is_disk_full",
    "is_local",
    "kept_file",
    "listing",
    "read_json",
    "read_text",
    "reading",
    "resolve_inside",
    "sha256",
    "unreadable",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

_SHOWN = 20
_LONGEST_PATH = 500


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. The message is one paragraph: which file or key, what
    was expected, what was found, and what to do next.

    >>> import swaa_jax as swaa
    >>> swaa.load_model("tiny-retriver")
    Traceback (most recent call last):
        ...
    swaa_jax.storage.CheckpointError: 'tiny-retriver': ... (did you mean 'tiny-retriever'?)...
    """


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` is on a filesystem of this machine (has rename, symlinks and mmap).

    >>> is_local("runs/a"), is_local("gs://bucket/runs/a")
    (True, False)
    """
    return "://" not in os.fspath(epath.Path(path))


def forget_listings(path: epath.Path) -> None:
    """Has a bucket's library ask anew what there is: fsspec's remember each listing for good, so
    that a process which looked too early would never see another one's checkpoint.

    >>> forget_listings(epath.Path("runs"))  # nothing to do for a directory of this machine
    """
    filesystem = getattr(getattr(path, "_backend", None), "fs", None)  # epath has no public way
    if filesystem is not None and not is_local(path):
        filesystem(path).invalidate_cache()


def unreadable(path: epath.PathLike, error: BaseException) -> CheckpointError:
    """The error of a path that cannot be opened or read, with what to do about it.

    >>> print(unreadable("model.json", PermissionError(13, "Permission denied")))
    'model.json': expected a path that ..., got an error (Permission denied); check that it is ...
    """
    text = path if isinstance(path, str) else os.fspath(path)
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    reason = f"{reason or type(error).__name__}"[:500].rstrip(".")
    scheme, remote, _ = text.partition("://")
    if not remote:
        advice = "check that it is what you meant and that you may read it"
    elif isinstance(error, KeyError):  # epath knows no such scheme
        reason = f"the scheme {scheme!r} is unknown"
        advice = "give a local path, gs://, s3:// or az://"
    elif isinstance(error, ImportError):
        extra = "pip install 'swaa-jax[gcs]'" if scheme == "gs" else "the fsspec package for it"
        advice = f"install what reads {scheme}://: {extra}"
    else:
        advice = (
            "check the network, the path, and that this account may read it (for gs://, "
            "`gcloud auth application-default login`)"
        )
    return CheckpointError(
        f"{text[:_LONGEST_PATH]!r}: expected a path that can be opened or read, got an error "
        f"({reason}); {advice}"
    )


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
    """Makes whatever fails in the block the error of a path that cannot be read: a bucket's library
    raises what it likes.

    Raises:
        CheckpointError: something failed.

    Examples:
        >>> with reading("gs://bucket/model"):
        ...     raise OSError("no route to host")
        Traceback (most recent call last):
            ...
        swaa_jax.storage.CheckpointError: 'gs://bucket/model': ... (no route to host); ...
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def check_space(place: epath.PathLike, needed: int, *, what: str, advice: str) -> None:
    """Refuses what the disk of `place` (which need not exist yet) has no room for.

    Raises:
        CheckpointError: less than `needed` bytes are free.

    Examples:
        >>> check_space("out", 10**18, what="model", advice="choose another disk")
        Traceback (most recent call last):
            ...
        swaa_jax.storage.CheckpointError: model: ...; choose another disk
    """
    disk = pathlib.Path(os.path.abspath(place))
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise CheckpointError(
            f"{what}: expected {_size(needed)} of free space on the disk of {os.fspath(place)}, "
            f"got {_size(free)}; nothing was written; {advice}"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no room on the disk, or none left to this account.

    >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def listing(names: Iterable[str], *, limit: int = _SHOWN, lists: int = 1) -> str:
    """`names` for an error message: all of them, or those that `first_of` shows "and N more".

    Where there are more than `limit`, keys that differ only in their layer number are first folded
    into one, so that a checkpoint of the wrong depth names many keys:

    >>> listing(["b.weight", "a.weight"])
    "'a.weight', 'b.weight'"
    >>> listing([f"layers.{i}.mlp.up.weight" for i in range(2, 36)])
    "'layers.{2..35}.mlp.up.weight'"
    """
    names = sorted(set(names))
    if len(names) > limit:
        names = _fold_layers(names)
    return first_of([show(name) for name in names], limit, lists=lists)


def _fold_layers(names: list[str]) -> list[str]:
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d{1,6})\.", name)
        pattern = name if not match else f"{name[: match.start(1)]}\0{name[match.end(1) :]}"
        groups.setdefault(pattern, []).append(int(match.group(1)) if match else 0)
    return [pattern.replace("\0", _runs(numbers)) for pattern, numbers in groups.items()]


def _runs(numbers: list[int]) -> str:
    """[0, 1, 2, 7] as "{0..2,7}"; one number as itself."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def resolve_inside(directory: epath.PathLike, name: str, *, under: str = "") -> epath.Path:
    """`directory / name`, which must not lead out of `directory`; `under` is a directory between.

    A checkpoint is data from elsewhere: an index that names `../../secrets`, or a symlink to a file
    outside, is refused. The Hugging Face cache is the one layout that links outward by design
    (`<repo>/snapshots/<revision>/x -> ../../blobs/<hash>`, which may link on to the `blobs` that
    repositories share); links into these two are followed.

    Raises:
        CheckpointError: `name` is not a plain file name, leads outside, or is there but is not a
            file. A name that is absent is returned.

    Examples:
        >>> resolve_inside("model", "../secrets")
        Traceback (most recent call last):
            ...
        swaa_jax.storage.CheckpointError: model: ... got '../secrets'; ...
    """
    directory = epath.Path(directory)
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(
            f"{directory}: expected the plain name of a file in this directory, such as "
            f"'model-00001-of-00002.safetensors', got {show(name)}; fix or rebuild the index"
        )
    path = directory / under / name
    if not is_local(directory):
        return path
    root = pathlib.Path(directory).resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        repository = root.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]
    try:
        target = pathlib.Path(path).resolve()
        regular = target.is_file() or not target.exists()  # a pipe, say, would hang
    except (OSError, RuntimeError) as error:  # a loop of links, or no permission
        raise CheckpointError(
            f"{path}: expected a file, got what cannot be followed to one ({error}); replace it by "
            "the file itself"
        ) from error
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{path}: expected a regular file, got a symbolic link to {target}, outside the "
            f"checkpoint directory {directory}; copy the file into the directory"
        )
    if not regular:
        raise CheckpointError(
            f"{path}: expected a regular file, got something else; fetch the file again"
        )
    return path


def sha256(path: epath.PathLike) -> str:
    """Hex SHA-256 of a file's bytes.

    >>> write_text_atomic("note.txt", "window=64")
    >>> sha256("note.txt")[:8]
    'ab8b9502'
    """
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: epath.PathLike) -> str:
    """A file's text.

    Raises:
        ValueError: it is not UTF-8; the file is named.
        FileNotFoundError: it is not there; the message says where it was looked for.
        OSError: it cannot be read.

    Examples:
        >>> write_text_atomic("note.txt", "window=64")
        >>> read_text("note.txt")
        'window=64'
    """
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        where = f" (the working directory is {os.getcwd()})" if is_local(path) else ""
        raise FileNotFoundError(
            f"{os.fspath(path)[:_LONGEST_PATH]}: expected a file that is there, got none; check "
            f"the path{where}"
        ) from error
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], error.start
        raise ValueError(
            f"{os.fspath(path)}: expected UTF-8 text, got the byte {byte:#04x} at {at}; save the "
            "file as UTF-8"
        ) from error


def read_json(path: epath.PathLike) -> Any:
    """What a JSON file holds, within the limits of `swaa_jax.documents`.

    Raises:
        ValueError: it is not UTF-8, no JSON, or nested too deep; the file is named.
        OSError: it cannot be read.

    Examples:
        >>> write_json_atomic("run.json", {"step": 3})
        >>> read_json("run.json")
        {'step': 3}
    """
    text = read_text(path)
    with naming(os.fspath(path)):
        return parse_json(text)


@contextlib.contextmanager
def kept_file(path: epath.PathLike) -> Iterator[None]:
    """Makes what fails in the block, which looks into a file of a run's, an error about the file.

    Raises:
        ValueError: the file's content is not what a run writes.

    Examples:
        >>> with kept_file("run.json"):
        ...     {}["step"]
        Traceback (most recent call last):
            ...
        ValueError: run.json: expected what a run wrote, got something else (KeyError: ...
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = show(" ".join(str(error).split()))
        raise ValueError(
            f"{os.fspath(path)}: expected what a run wrote, got something else "
            f"({type(error).__name__}: {reason}); remove the file, and it is made again"
        ) from error


def write_text_atomic(path: epath.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) to `path`; a reader sees the old file or the new one, never a part.

    >>> write_text_atomic("note.txt", "window=64")
    >>> os.listdir()  # nothing half-written beside it
    ['note.txt']
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path`; a reader sees the old file or the new one, never a part.

    >>> write_bytes_atomic("note.bin", b"abc")
    >>> os.listdir()
    ['note.bin']
    """
    path = epath.Path(path)
    if not is_local(path):  # an object store's put is atomic
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with _told_when_full(path, len(data)), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _told_when_full(path: epath.PathLike, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise CheckpointError(
            f"{os.fspath(path)}: expected room for {_size(size)}, got a disk that is full; the "
            "file is as it was before; free some space and run the same again"
        ) from error


def write_json_atomic(path: epath.PathLike, obj: object) -> None:
    """Writes `obj` as indented JSON; see `write_text_atomic`.

    Raises:
        CheckpointError: `obj` has a number that is not finite, which JSON has not; it is named, and
            nothing is written.
        TypeError: `obj` has something else that is not JSON.

    Examples:
        >>> write_json_atomic("run.json", {"loss": float("nan")})
        Traceback (most recent call last):
            ...
        swaa_jax.storage.CheckpointError: run.json: loss: ... got nan; nothing was written; ...
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        found = next(_not_finite(obj, ""), None)
        if found is None:
            raise
        name, value = found
        raise CheckpointError(
            f"{os.fspath(path)}: {name[:200]}: expected a finite number, since JSON has no others, "
            f"got {value}; nothing was written; set it to null, or leave it out"
        ) from error
    write_text_atomic(path, text)


def _not_finite(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Dotted names of the numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{at}]")
