"""Bytes of tensors out of a safetensors file: mapped where it is local, by ranges where it is not.

Both count the bytes that they read. Headers are checked before, by `_header.read_header`.
"""

import math
import os
from typing import IO, Any

import numpy as np
import safetensors
from etils import epath

from swaa_jax.checkpoint._header import DTYPES, TensorInfo
from swaa_jax.storage import CheckpointError, is_local, unreadable

Bounds = tuple[tuple[int, int], ...]
"""First and last-but-one index along each axis."""


def open_tensors(path: epath.Path) -> "MappedFile | RangeFile":
    """A reader for the tensors of one file."""
    return MappedFile(path) if is_local(path) else RangeFile(path)


class MappedFile:
    """A file of this machine; the operating system reads the pages that a slice touches."""

    def __init__(self, path: epath.Path):
        self.bytes_read = 0
        try:
            self._handle: Any = safetensors.safe_open(os.fspath(path), framework="numpy")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: expected a sound safetensors file, got an error ({error}); fetch or "
                "write the file again"
            ) from error

    def read(self, name: str, info: TensorInfo, bounds: Bounds) -> np.ndarray:
        """The part of a tensor within `bounds`, as a fresh array."""
        if _shape(bounds) == info.shape:
            value = self._handle.get_tensor(name)
        else:
            value = self._handle.get_slice(name)[tuple(slice(*pair) for pair in bounds)]
        self.bytes_read += value.nbytes
        return value


class RangeFile:
    """A file in a bucket: rows of the first axis are one range of bytes and are read alone. A slice
    along another axis is cut from the whole tensor, which is kept until another tensor is read, so
    that the slices of several devices cost one transfer. Not for several threads at once.
    """

    def __init__(self, path: epath.Path):
        self.bytes_read = 0
        self._path = path
        self._file: IO[Any] | None = None
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, name: str, info: TensorInfo, bounds: Bounds) -> np.ndarray:
        """The part of a tensor within `bounds`, as a fresh array."""
        if self._whole is not None and self._whole[0] != name:
            self._whole = None
        rows = bounds[0] if bounds else (0, 1)
        if self._whole is None and bounds[1:] == tuple((0, size) for size in info.shape[1:]):
            return self._rows(info, rows).reshape(_shape(bounds))
        if self._whole is None:
            self._whole = name, self._rows(info, (0, info.shape[0])).reshape(info.shape)
        return self._whole[1][tuple(slice(*pair) for pair in bounds)].copy()

    def _rows(self, info: TensorInfo, rows: tuple[int, int]) -> np.ndarray:
        width = math.prod(info.shape[1:]) * DTYPES[info.dtype].itemsize
        start, count = info.offset + rows[0] * width, (rows[1] - rows[0]) * width
        try:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(start)
            data = self._file.read(count)
        except Exception as error:  # a bucket's library raises what it likes
            self._file = None
            raise unreadable(self._path, error) from error
        self.bytes_read += len(data)
        if len(data) != count:
            raise CheckpointError(
                f"{self._path}: expected bytes {start} to {start + count}, got {len(data)} of "
                "them; the file was changed while it was read, or the connection broke: try again"
            )
        # A copy: an array over `bytes` cannot be written to.
        return np.frombuffer(data, DTYPES[info.dtype]).copy()


def _shape(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)
