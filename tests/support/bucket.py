"""`gs://` paths without a network: fsspec's memory filesystem, less what object stores lack."""

from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Bucket(MemoryFileSystem):
    """An object store: no rename, no directories. `store` has the objects in the order of their
    puts; writes to a name that ends in `fail_on` raise `error`; `ranges` has (path, start, stop)
    of every read.
    """

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail_on: ClassVar[str | None] = None
    error: ClassVar[type[BaseException]] = OSError
    ranges: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        for prefix in ("gs://", "gcs://"):
            path = path.removeprefix(prefix)
        return path.strip("/")

    @classmethod
    def names(cls) -> list[str]:
        return sorted(cls.store)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and self.fail_on and path.endswith(self.fail_on):
            raise self.error("the network went away")
        file = super()._open(path, mode, **kwargs)
        return _Recorded(file, path, self.ranges) if "r" in mode else file

    def mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an object store has no directories")

    makedirs = mkdir

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an object store has no rename")

    rename = mv


class _Recorded:
    def __init__(self, file: MemoryFile, path: str, ranges: list[tuple[str, int, int]]):
        self._file, self._path, self._ranges = file, path, ranges

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        self._ranges.append((self._path, start, start + len(data)))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Recorded":
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()


@pytest.fixture
def bucket() -> Iterator[type[Bucket]]:
    """`gs://` is an empty `Bucket` during the test."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    _empty()
    yield Bucket
    _empty()
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, "gcsfs.GCSFileSystem", clobber=True)


def _empty() -> None:
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.ranges.clear()
    Bucket.fail_on, Bucket.error = None, OSError
