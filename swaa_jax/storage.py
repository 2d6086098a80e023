"""Paths and atomic saves: whatever is written is either all there or not there at all.

Every path goes through `etils.epath`, so `gs://` works where its filesystem package is installed.

    local   write in a hidden directory beside the target, then one rename
    remote  object stores have no rename: write in a local scratch directory, copy the files up, and
            copy the commit mark (`config.json`) last; a directory without it is not a checkpoint
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
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from swaa_jax.documents import parse_json
from swaa_jax.fields import first_of, naming, show

__all__ = [
    "COMMIT_MARK",
    "CheckpointError",
    "atomic_directory",
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

COMMIT_MARK = "config.json"
"""The file that is written last, and without which a directory is not taken for a checkpoint.

>>> COMMIT_MARK
'config.json'
"""

_SHOWN = 20
_LONGEST_PATH = 500
_SWAPS = 20  # attempts where several processes save at one path


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
        OSError: it cannot be read.

    Examples:
        >>> write_text_atomic("note.txt", "window=64")
        >>> read_text("note.txt")
        'window=64'
    """
    try:
        return epath.Path(path).read_text(encoding="utf-8")
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


@contextlib.contextmanager
def atomic_directory(
    path: epath.PathLike, *, overwrite: bool = False, commit_mark: str = COMMIT_MARK
) -> Iterator[epath.Path]:
    """A directory to write in, which becomes `path` when the block ends and vanishes if it raises.

        with atomic_directory("out/model") as directory:
            (directory / "config.json").write_text("{}")

    Locally the block writes in `.<name>.<random>.tmp` beside the target and one rename publishes
    it. With `overwrite`, the old directory is moved aside, the new one moved in and the old one
    removed: between these two renames neither is at `path` (POSIX cannot swap directories
    portably), but both are on disk, and any exception puts the old one back. Missing parents are
    made, and removed again on failure. A killed process can leave the hidden directory behind.

    Remotely (`gs://...`) the block writes in a local scratch directory (`TMPDIR` says where), and
    the files are copied up with `commit_mark` last; a failure removes what was copied. What this
    gives up: local disk of the checkpoint's size, and with `overwrite` the old files, which go
    before the new ones come: their `commit_mark` first, so that no reader takes a mixture.

    Args:
        path: the directory to make. It must not exist, or be empty.
        overwrite: replace an existing `path`; only if it holds `commit_mark`, so that a mistyped
            path does not cost somebody their home directory.
        commit_mark: the file that marks a complete directory.

    Raises:
        CheckpointError: `path` exists and may not be replaced, cannot be made, or the disk is full:
            nothing changed. Or the copy to a remote `path` failed: nothing complete is there.

    Examples:
        >>> with atomic_directory("out/model") as directory:
        ...     written = (directory / "config.json").write_text("{}")
        >>> os.listdir("out")
        ['model']
    """
    try:
        target = epath.Path(path).expanduser()
    except KeyError as error:
        raise unreadable(path, error) from error
    if is_local(target):
        # absolute, so that "." and "x/.." have a name and a chdir inside the block is harmless
        target = epath.Path(os.path.abspath(target))
    _check_target(target, overwrite=overwrite, commit_mark=commit_mark)
    publish = _local_directory if is_local(target) else _remote_directory
    try:
        with publish(target, commit_mark) as directory:
            yield directory
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise CheckpointError(
            f"{target}: expected room for the files, got a disk that is full; nothing was saved; "
            "free some space, or choose another place (for a remote path, TMPDIR is where the "
            "files are written first)"
        ) from error


def _check_target(target: epath.Path, *, overwrite: bool, commit_mark: str) -> None:
    with reading(target):
        forget_listings(target)
        if not target.exists():
            return
        is_file = not target.is_dir()
        names = [] if is_file else [path.name for path in target.iterdir()]
    if is_file:
        raise CheckpointError(
            f"{target}: expected a directory to save in, got a file; choose another path"
        )
    if not names:
        return
    if not overwrite:
        raise CheckpointError(
            f"{target}: expected a new or empty directory, got one that exists and is not empty; "
            "nothing was written; choose another path, or pass overwrite=True (--overwrite) to "
            "replace it"
        )
    if commit_mark not in names:
        raise CheckpointError(
            f"{target}: expected a saved model to overwrite, got a directory without "
            f"{commit_mark}, which overwrite=True does not remove; choose another path, or "
            "remove it yourself"
        )


@contextlib.contextmanager
def _local_directory(target: epath.Path, commit_mark: str) -> Iterator[epath.Path]:
    del commit_mark  # one rename publishes all files at once
    made = _make_parents(target)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        try:
            os.mkdir(scratch)
        except OSError as error:
            raise CheckpointError(
                f"{target}: expected a path where a directory can be made, got "
                f"{error.strerror!r}; nothing was written; choose one in a directory that you may "
                "write in"
            ) from error
        yield epath.Path(scratch)
        _sync_files(scratch)
        _swap_in(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:  # innermost first; one that somebody else now uses stays
            with contextlib.suppress(OSError):
                os.rmdir(parent)
        raise


def _make_parents(target: epath.Path) -> list[pathlib.Path]:
    missing = [p for p in pathlib.Path(target).parents if not p.exists()]
    try:
        pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{target}: expected a parent directory that can be made, got {error.strerror!r} at "
            f"{error.filename}; nothing was written; choose another path"
        ) from error
    return missing


def _sync_files(directory: epath.PathLike) -> None:
    """Flushes data to the disk before the rename makes it visible, so that a power cut after the
    save cannot leave a directory of empty files.
    """
    for root, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _swap_in(scratch: epath.Path, target: epath.Path) -> None:
    """Moves the new directory to its place. Of several savers the last one's stays."""
    for _ in range(_SWAPS):
        try:
            _swap_once(scratch, target)
            return
        except (FileNotFoundError, FileExistsError) as error:
            problem = error  # another saver was between our two renames, or we between its two
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            problem = error
    raise CheckpointError(
        f"{target}: expected to be the one that saves there, got others that do too "
        f"({problem.strerror}); nothing was saved; choose another path, or wait for them"
    )


def _swap_once(scratch: epath.Path, target: epath.Path) -> None:
    if not os.path.isdir(target) or not os.listdir(target):
        os.rename(scratch, target)  # onto nothing, or onto an empty directory
        return
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except BaseException:
        try:
            os.rename(old, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # another saver's is there by now
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _remote_directory(target: epath.Path, commit_mark: str) -> Iterator[epath.Path]:
    with tempfile.TemporaryDirectory(prefix="swaa-save-") as scratch:
        yield epath.Path(scratch)
        files = [p.relative_to(scratch) for p in pathlib.Path(scratch).rglob("*") if p.is_file()]
        files.sort(key=lambda name: (name == pathlib.Path(commit_mark), str(name)))
        copied: list[epath.Path] = []
        replaced = ""
        try:
            # No mkdir: object stores have no directories, and some would make the bucket.
            if (target / commit_mark).exists():
                (target / commit_mark).unlink()  # from here on readers refuse the directory
                replaced = "; what was there before is gone too"
            for stale in list(target.iterdir()) if target.exists() else ():
                stale.rmtree() if stale.is_dir() else stale.unlink()
            for name in files:
                destination = target / name.as_posix()
                copied.append(destination)
                epath.Path(pathlib.Path(scratch) / name).copy(destination, overwrite=True)
        except BaseException as error:
            for destination in reversed(copied):
                with contextlib.suppress(Exception):
                    destination.unlink(missing_ok=True)
            if not isinstance(error, Exception):
                raise
            reason = " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
            raise CheckpointError(
                f"{target}: expected a copy of the files, got an error ({reason}); what was copied "
                f"has been removed as far as possible, and without {commit_mark} nothing reads it"
                f"{replaced}; check the network and that this account may write there, then save "
                "again"
            ) from error
