"""Checkpoints by name: a local directory, a shipped model, a bucket, or a Hugging Face hub id.

Downloading, its cache and its settings (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) are
`huggingface_hub`'s. What is added here: only the files that a load needs, checks before gigabytes
travel, and one paragraph for each way in which it can fail.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from swaa_jax.checkpoint._paths import check_directory
from swaa_jax.checkpoint.hf import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    NAMED_TEMPLATES,
    POLICY_FILE,
    PROVENANCE_FILE,
    TOKENIZER_FILES,
    read_config,
)
from swaa_jax.checkpoint.safetensors_io import INDEX_FILE, find_weights
from swaa_jax.fields import describe
from swaa_jax.runtime import is_main_process
from swaa_jax.storage import CheckpointError, check_space, is_disk_full, is_local, listing

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZER_ONLY = (*TOKENIZER_FILES, CONFIG_FILE)
_SMALL_FILES = (*_TOKENIZER_ONLY, GENERATION_CONFIG_FILE, POLICY_FILE, PROVENANCE_FILE, INDEX_FILE)


def open_checkpoint(
    path_or_hub_id: epath.PathLike, revision: str | None = None, *, weights: bool = True
) -> epath.Path:
    """The directory of a checkpoint, downloaded first where it is named by a hub id.

    A path that exists comes before a hub id of the same form; `hf://org/name` is always the hub's.
    Downloads go to the hub's cache and only what is not there yet is fetched: the config, the
    tokenizer's files, the policy, and of the weights `model.safetensors` or the shards that the
    index names; never pickles, GGUF or consolidated copies. Where the hub cannot be asked, a
    complete copy in the cache is used, with a warning. In a run of several processes each host
    needs the files: every process may call this, and those of one host share the cache.

    Args:
        path_or_hub_id: a directory (local, or `gs://bucket/...`), the name of a shipped model, or
            a hub id such as `Qwen/Qwen3-4B`.
        revision: of a hub id: a branch, a tag or a commit. None: the main branch. With a full
            commit hash that is in the cache already, the hub is not asked at all.
        weights: whether the weights are needed; without, the tokenizer's files and the config.

    Raises:
        CheckpointError: there is no such directory, or the download failed; one paragraph says
            what was asked for, what happened, and what to do.
        ValueError: a `revision` of a directory.

    Examples:
        >>> open_checkpoint("tiny-retriever").name  # a hub id is downloaded
        'tiny-retriever'
    """
    repo_id = _hub_id(path_or_hub_id)
    if repo_id is not None:
        return _Repository(repo_id, revision).fetch(weights=weights)
    directory = check_directory(path_or_hub_id)
    if revision is not None:
        hint = ""
        if _HUB_ID.fullmatch(str(path_or_hub_id)):
            hint = f"; pass 'hf://{path_or_hub_id}' for the hub's model of that name"
        raise ValueError(
            f"revision: expected none for the directory {directory}, got {describe(revision)}; "
            f"only a hub id has revisions{hint}"
        )
    needed = ("config.json",) if weights else ("config.json", "tokenizer_config.json")
    is_adapter = is_local(directory) and (directory / "adapter_config.json").exists()
    if is_adapter and not any((directory / name).exists() for name in needed):
        raise CheckpointError(
            f"{directory}: expected a model, got adapters alone; use load_adapter(model, "
            "directory), or train with merge=true and give the directory merged/"
        )
    return directory


def _hub_id(path_or_hub_id: epath.PathLike) -> str | None:
    """The hub id that is meant, or None for a path."""
    if not isinstance(path_or_hub_id, str):
        return None
    if path_or_hub_id.startswith(_HUB_PREFIX):
        repo_id = path_or_hub_id.removeprefix(_HUB_PREFIX)
        if not _HUB_ID.fullmatch(repo_id):
            raise CheckpointError(
                f"hub id: expected hf://organisation/name, got {describe(path_or_hub_id)}; a "
                "revision is an argument of its own"
            )
        return repo_id
    if not _HUB_ID.fullmatch(path_or_hub_id) or os.path.exists(path_or_hub_id):
        return None
    return path_or_hub_id


@dataclasses.dataclass(frozen=True)
class _File:
    size: int
    blob: str | None  # what the cache calls its content


class _Repository:
    """One revision of a model on the hub."""

    def __init__(self, repo_id: str, revision: str | None):
        self.repo_id = repo_id
        self.revision = revision

    def __str__(self) -> str:
        return f"{self.repo_id!r}" + (f" at {self.revision!r}" if self.revision else "")

    def fetch(self, *, weights: bool) -> epath.Path:
        """The directory of this revision, with every file that is needed in it."""
        from huggingface_hub import constants, errors

        cached = self._cached(weights=weights)
        if cached is not None and _COMMIT.fullmatch(self.revision or "") and self._complete(cached):
            return cached  # a commit does not change
        if constants.HF_HUB_OFFLINE:
            if cached is not None:
                self._warn_if_policy_unknown(cached)
                return cached
            raise CheckpointError(self._offline())
        try:
            commit, files = self._ask()
        except Exception as error:
            if cached is None or isinstance(error, errors.RevisionNotFoundError):
                raise CheckpointError(self._explain(error)) from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            logger.warning(
                "%s: expected an answer of the hub, got an error (%s); using the copy in the "
                "cache, %s",
                self,
                reason,
                cached,
            )
            self._warn_if_policy_unknown(cached)
            return cached
        if not weights:
            return self._download(commit, files, _wanted(files, _TOKENIZER_ONLY))
        if CONFIG_FILE not in files:
            raise CheckpointError(
                f"{self} on the hub: expected a checkpoint in Hugging Face layout, with a "
                f"{CONFIG_FILE}, got {listing(files, limit=8)}; it may be an adapter, a GGUF or a "
                "dataset: check the id"
            )
        directory = self._download(commit, files, _wanted(files, _SMALL_FILES))
        read_config(directory)  # refuses a quantised checkpoint before its weights travel
        shards = find_weights(directory, files, where=f"{self} on the hub").files
        directory = self._download(commit, files, shards, show=True)
        self._note_policy(commit, files)
        return directory

    # --- the hub

    def _ask(self) -> tuple[str, dict[str, _File]]:
        """The commit that the revision stands for, and the files of it."""
        from huggingface_hub import HfApi, constants

        try:
            info = HfApi(library_name="swaa_jax").model_info(
                self.repo_id,
                revision=self.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (KeyError, TypeError, ValueError) as error:  # such as a login page of the network
            raise OSError("what is there does not answer as a hub does") from error
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise OSError(f"what is there does not answer as a hub does (commit {info.sha!r})")
        files = {}
        for sibling in info.siblings or ():
            lfs = sibling.lfs
            blob = sibling.blob_id if lfs is None else lfs.sha256
            files[sibling.rfilename] = _File(size=sibling.size or 0, blob=blob)
        return info.sha, files

    def _download(
        self, commit: str, files: Mapping[str, _File], names: Collection[str], *, show: bool = False
    ) -> epath.Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Silent(tqdm):
            def __init__(self, *args: object, **kwargs: object):
                super().__init__(*args, **{**kwargs, "disable": True})

        show = show and is_main_process() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        folder = _cache_folder(self.repo_id)
        directory = folder / "snapshots" / commit
        missing = [name for name in names if not (directory / name).exists()]
        if missing or not directory.exists():
            self._check_space(folder, [files[name] for name in missing])
            try:
                with _retries_told_once():
                    got = snapshot_download(
                        self.repo_id,
                        revision=commit,
                        allow_patterns=[_exactly(name) for name in names],
                        library_name="swaa_jax",
                        tqdm_class=None if show else Silent,
                    )
            except Exception as error:
                raise CheckpointError(self._explain(error)) from error
            directory = pathlib.Path(got)
        absent = [name for name in names if not (directory / name).exists()]
        if absent:
            raise CheckpointError(
                f"{self}: expected all files that the hub lists, got a download without "
                f"{listing(absent)}; try again, and if it stays so, remove {directory} first"
            )
        self._note_branch(commit)
        return epath.Path(directory)

    def _note_branch(self, commit: str) -> None:
        """Records in the cache which commit the branch is, for use without the hub."""
        revision = self.revision or "main"
        if _COMMIT.fullmatch(revision):
            return
        ref = _cache_folder(self.repo_id) / "refs" / revision
        try:
            if not ref.exists() or ref.read_text() != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)
        except OSError as error:  # a cache that may only be read
            logger.debug("%s: cannot record the commit of %s (%s)", self, revision, error)

    def _check_space(self, folder: pathlib.Path, files: Collection[_File]) -> None:
        blobs = folder / "blobs"
        needed = sum(f.size for f in files if not f.blob or not (blobs / f.blob).exists())
        check_space(
            folder,
            needed,
            what=f"{self}: the download",
            advice="free some space, or set HF_HOME to a directory on a larger disk",
        )

    # --- the cache

    def _cached(self, *, weights: bool) -> epath.Path | None:
        """The snapshot that the revision last stood for, if the cache has what is needed of it."""
        from huggingface_hub import try_to_load_from_cache

        probes = (CONFIG_FILE,) if weights else TOKENIZER_FILES
        for probe in probes:
            path = try_to_load_from_cache(self.repo_id, probe, revision=self.revision)
            if isinstance(path, str):
                directory = epath.Path(path).parent
                break
        else:
            return None
        if weights:
            try:
                names = [path.name for path in directory.iterdir()]
                find_weights(directory, names)
            except CheckpointError:
                return None
        return directory

    def _complete(self, directory: epath.Path) -> bool:
        """Whether this module (and not some other program) filled the snapshot: it may lack files
        that change the result, such as the policy, although the weights are there.
        """
        from huggingface_hub import try_to_load_from_cache

        known = try_to_load_from_cache(self.repo_id, POLICY_FILE, revision=directory.name)
        return known is not None

    def _note_policy(self, commit: str, files: Collection[str]) -> None:
        """Has the cache remember that the revision has no policy of its own."""
        from huggingface_hub import hf_hub_download

        if POLICY_FILE in files or self._complete(epath.Path(commit)):
            return
        try:
            hf_hub_download(self.repo_id, POLICY_FILE, revision=commit, library_name="swaa_jax")
        except Exception as error:  # absent, as expected; or not remembered, which costs little
            logger.debug("%s: %s", self, error)

    def _warn_if_policy_unknown(self, directory: epath.Path) -> None:
        if not self._complete(directory):
            logger.warning(
                "%s: expected a cache that tells whether this model has an %s, got one that does "
                "not; without the hub it is taken to have none",
                self,
                POLICY_FILE,
            )

    # --- what can go wrong

    def _offline(self) -> str:
        return (
            f"{self}: expected a local directory of that name, or a complete copy in the cache "
            f"{_cache_folder(self.repo_id).parent}, got neither, and the hub may not be asked "
            "(HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set); unset the variable to download it, "
            "copy the cache from a machine that has it, or pass a directory"
        )

    def _explain(self, error: Exception) -> str:
        """One paragraph on a failed request or download."""
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.repo_id}"
        for cause in _causes(error):
            number = getattr(cause, "errno", None) if isinstance(cause, OSError) else None
            if is_disk_full(cause):
                return (
                    f"{self}: expected room for the download to {_cache_folder(self.repo_id)}, got "
                    "a disk that is full; free some space, or set HF_HOME to a directory on a "
                    "larger disk (files that are complete are not fetched again)"
                )
            if number in (errno.EACCES, errno.EROFS, errno.EPERM):
                return (
                    f"{self}: expected a cache that can be written, got an error ({cause}); set "
                    "HF_HOME to a directory that you may write in"
                )
            if isinstance(cause, errors.GatedRepoError):
                return (
                    f"{self}: expected an account that has accepted its owners' terms, got a "
                    f"refusal (the model is gated); ask for access at {page}, then log in with "
                    f"`hf auth login` or set HF_TOKEN ({_token()})"
                )
            if isinstance(cause, errors.RepositoryNotFoundError):
                return (
                    f"{self}: expected a local directory of that name, or a model on the hub "
                    f"({page}), got neither that this account can see; check the spelling, and if "
                    "the model is private, log in with `hf auth login` or set HF_TOKEN "
                    f"({_token()})"
                )
            if isinstance(cause, errors.RevisionNotFoundError):
                return (
                    f"{self.repo_id!r}: expected a revision that is a branch, a tag or a full "
                    f"commit hash, got {describe(self.revision)}; see {page}/commits/main for what "
                    "there is"
                )
            if isinstance(cause, errors.OfflineModeIsEnabled):
                return self._offline()
            if isinstance(cause, errors.HfHubHTTPError):
                return self._explain_status(cause, page)
            if _is_transport(cause):
                return (
                    f"{self}: expected an answer of the hub at {constants.ENDPOINT}, a complete "
                    "copy in the cache or a local directory of that name, got none of them "
                    f"({_reason(cause)}); check the network and the proxy (HTTPS_PROXY), set "
                    "HF_ENDPOINT to a mirror, or pass a directory"
                )
        return (
            f"{self}: expected a download from {constants.ENDPOINT}, got an error "
            f"({_reason(error)}); try again (files that are complete are not fetched again)"
        )

    def _explain_status(self, error: Any, page: str) -> str:
        status = error.response.status_code
        if status == 401:
            return (
                f"{self}: expected a token that the hub accepts, got status 401 ({_token()}); log "
                "in again with `hf auth login`, or set HF_TOKEN to a valid token or to nothing"
            )
        if status == 403:
            return (
                f"{self}: expected access to the model, got status 403 ({_token()}); give the "
                f"token the permission to read it, or ask for access at {page}"
            )
        if status == 429:
            after = error.response.headers.get("retry-after")
            wait = f"in {after} seconds" if after else "in a few minutes"
            return (
                f"{self}: expected an answer of the hub, got status 429 (it limits the rate of "
                f"requests from here); try again {wait}, log in (`hf auth login`) for a higher "
                "limit, and where many hosts start at once, pass a commit hash as revision, so "
                "that a filled cache needs no request"
            )
        if status >= 500:
            return (
                f"{self}: expected an answer of the hub, or a complete copy in the cache, got "
                f"status {status} and no copy; try again later (https://status.huggingface.co "
                "tells how the hub is)"
            )
        return (
            f"{self}: expected an answer of the hub, got status {status} ({_reason(error)}); check "
            f"the id and the revision at {page}"
        )


def _cache_folder(repo_id: str) -> pathlib.Path:
    """Where the hub's cache keeps a model: `blobs`, `refs` and `snapshots` below it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    return pathlib.Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder


@contextlib.contextmanager
def _retries_told_once() -> Iterator[None]:
    """The library warns of every retry of every file; the first is enough to know why it takes."""
    told: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if not told:
            told.append(record.getMessage())
            logger.info("trying again: %s", told[0])
        return False

    loggers = [logging.getLogger(f"huggingface_hub.{n}") for n in ("utils._http", "file_download")]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)


def _wanted(files: Collection[str], names: Collection[str]) -> list[str]:
    """Those names that the hub has, and the named chat templates."""
    templates = re.compile(rf"{NAMED_TEMPLATES}/[^/]+\.jinja")
    return [n for n in names if n in files] + sorted(n for n in files if templates.fullmatch(n))


def _exactly(name: str) -> str:
    """`name` as a pattern that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transport(error: BaseException) -> bool:
    # By name: httpx is an import of huggingface_hub 1, httpx2 of huggingface_hub 2.
    names = {cls.__name__ for cls in type(error).__mro__}
    return "TransportError" in names or isinstance(error, ConnectionError | TimeoutError)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _token() -> str:
    from huggingface_hub import get_token

    return "a token is set" if get_token() else "no token is set"
