"""Bytes of tensors out of a safetensors file, of this machine or of a bucket.

Both count the bytes that they read. Headers are checked before, by `_header.read_header`.
"""

import math
import os
import weakref
from typing import IO, Any

import numpy as np
from etils import epath

from swaa_jax.checkpoint._header import DTYPES, TensorInfo
from swaa_jax.storage import CheckpointError, is_local, unreadable

Bounds = tuple[tuple[int, int], ...]
"""First and last-but-one index along each axis."""


def open_tensors(path: epath.Path) -> "LocalFile | RangeFile":
    """A reader for the tensors of one file."""
    return LocalFile(path) if is_local(path) else RangeFile(path)


class LocalFile:
    """A file of this machine, of which just the bytes of a slice are read.

    It is not mapped: reading a mapped file that somebody cuts short ends the process (SIGBUS).
    """

    def __init__(self, path: epath.Path):
        self.bytes_read = 0
        self._path = os.fspath(path)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from error
        weakref.finalize(self, os.close, self._file)

    def read(self, name: str, info: TensorInfo, bounds: Bounds) -> np.ndarray:
        """The part of a tensor within `bounds`, as a fresh array."""
        del name
        value = np.empty(_shape(bounds), DTYPES[info.dtype])
        if value.size:
            self._fill(value, info.shape, bounds, info.offset)
            self.bytes_read += value.nbytes
        return value

    def _fill(self, value: np.ndarray, shape: tuple[int, ...], bounds: Bounds, offset: int) -> None:
        """Reads the part of a tensor of that shape which begins at `offset` into the array."""
        step = math.prod(shape[1:]) * value.itemsize
        offset += step * bounds[0][0] if bounds else 0
        if bounds[1:] == tuple((0, size) for size in shape[1:]):
            self._into(value.reshape(-1).view(np.uint8), offset)
            return
        for number in range(len(value)):
            self._fill(value[number], shape[1:], bounds[1:], offset + number * step)

    def _into(self, data: np.ndarray, offset: int) -> None:
        done = 0
        while done < data.size:  # one call reads 2 GiB at most
            try:
                count = os.preadv(self._file, [data.data[done:]], offset + done)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if not count:
                raise CheckpointError(
                    f"{self._path}: expected {data.size} bytes from byte {offset} on, got {done}; "
                    "the file was cut while it was read: fetch it again"
                )
            done += count


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
