"""Directories that are written whole or not at all.

local   write in a hidden directory beside the target, then one rename
remote  object stores have no rename: write in a local scratch directory, copy the files up, and
copy the commit mark (`config.json`) last; a directory without it is not a checkpoint
"""

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from swaa_jax.storage import (
    CheckpointError,
    forget_listings,
    is_disk_full,
    is_local,
    reading,
    unreadable,
)

__all__ = ["COMMIT_MARK", "atomic_directory"]

COMMIT_MARK = "config.json"
"""The file that is written last, and without which a directory is not taken for a checkpoint.

>>> COMMIT_MARK
'config.json'
"""

_SWAPS = 20  # attempts where several processes save at one path


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
