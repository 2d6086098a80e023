"""Where tokens are kept from one run to the next, and under which key; see `samples.py`."""

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from swaa_jax.data.config import DataConfig
from swaa_jax.directories import atomic_directory
from swaa_jax.records import SHIPPED, DataError
from swaa_jax.runs import fingerprint
from swaa_jax.storage import CheckpointError, is_local, reading, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "META",
    "VERSION",
    "cache_key",
    "cache_place",
    "check_unchanged",
    "copy_cache",
    "file_stats",
    "is_there",
]

log = logging.getLogger(__name__)

VERSION = 6
META = "meta.json"
"""The file that is written last, and without which there is no cache."""

_SETTINGS = (
    *("format", "columns", "chat_template", "chat_template_kwargs", "answers", "stop_tokens"),
    *("answer_stage", "loss_on", "split_answers", "judge_column", "min_length", "on_too_long"),
    "tokens",
)


def cache_key(
    files: Sequence[epath.Path], tok: "PreTrainedTokenizerBase", config: DataConfig
) -> str:
    """A key of the files' contents, the tokenizer and the settings that tokens depend on."""
    described = []
    for file in files:
        # Neither size nor time: a file may change within a second and keep both.
        with reading(file):
            described.append([file.suffix, sha256(file)])
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings["limit"] = config.max_length or config.seq_len
    identity = [VERSION, described, _tokenizer_identity(tok), settings]
    return fingerprint(identity, digits=32)


def file_stats(files: Sequence[epath.Path]) -> list[tuple[object, ...]]:
    """What shows that a file was written while it was read."""
    stats = []
    for file in files:
        with reading(file):
            found = os.stat(file) if is_local(file) else file.stat()
        if isinstance(found, os.stat_result):
            stats.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        else:
            stats.append((found.length, found.mtime))
    return stats


def check_unchanged(files: Sequence[epath.Path], before: Sequence[tuple[object, ...]]) -> None:
    """Refuses files that were written since these stats.

    Raises:
        DataError: one was.
    """
    for file, old, new in zip(files, before, file_stats(files), strict=True):
        if old != new:
            raise DataError(
                f"{os.fspath(file)}: expected a file that stays as it is while it is read, got one "
                "that was written meanwhile; start again"
            )


def _tokenizer_identity(tok: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tok, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tok.get_vocab().items())
    parts = [type(tok).__name__, vocabulary, str(tok.chat_template), str(tok.special_tokens_map)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cache_place(
    files: Sequence[epath.Path], key: str, config: DataConfig
) -> tuple[epath.Path, epath.Path | None]:
    """The local directory, and the remote one that it is shared through."""
    user = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    user = user / "swaa_jax" / "data" / key
    if config.cache_dir is not None:
        chosen = epath.Path(config.cache_dir).expanduser() / key
        return (chosen, None) if is_local(chosen) else (user, chosen)
    parent = files[0].parent
    if files[0] not in SHIPPED.values() and is_local(parent) and os.access(parent, os.W_OK):
        return parent / ".swaa_cache" / key, None
    return user, None


def is_there(place: epath.Path) -> bool:
    """Whether a place, perhaps in a bucket, holds a whole cache."""
    with reading(place):
        return (place / META).exists()


def copy_cache(source: epath.Path, target: epath.Path) -> None:
    """Copies a cache between a bucket and this machine, if it is whole."""
    if not is_there(source):
        return
    try:
        with atomic_directory(target, overwrite=True, commit_mark=META) as directory:
            for path in source.iterdir():
                path.copy(directory / path.name)
    except CheckpointError as error:
        log.warning("the cache is not shared: %s", error)
