"""Rows of parquet and jsonl files by number: the random access that Grain's datasets stand on."""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from swaa_jax.storage import reading

__all__ = ["DataError", "Row", "Rows", "find_files", "open_rows"]

SUFFIXES = (".parquet", ".jsonl", ".ndjson")


class DataError(ValueError):
    """The data cannot be trained on. One paragraph: which file and row, what was expected, what was
    found, and what to do next.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row and where it is from.

    Attributes:
        file: the path, as messages name it.
        index: number of the row in its file, from 0.
        fields: column to value.
    """

    file: str
    index: int
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """For messages: ``data.jsonl, row 3``."""
        return f"{self.file}, row {self.index}"


def find_files(patterns: Sequence[str]) -> list[epath.Path]:
    """The files that are meant, in the order given, those of a directory or pattern sorted.

    Raises:
        DataError: no such file, a directory without data, or a format that is not read.
        CheckpointError: a path that cannot be looked at (a bucket without access, say).
    """
    if not patterns:
        raise DataError("files: expected at least one parquet or jsonl file, got none.")
    found: list[epath.Path] = []
    for pattern in patterns:
        with reading(pattern):
            path = epath.Path(pattern).expanduser()
            if any(c in pattern for c in "*?["):
                matches = sorted(_glob(path), key=str)
            elif path.is_dir():
                matches = sorted((p for p in path.iterdir() if _is_data(p)), key=str)
            else:
                matches = [path] if path.exists() else []
        if not matches:
            raise DataError(
                f"files: nothing is at {pattern!r}: expected a {' or '.join(SUFFIXES)} file, a "
                "directory of them, or a glob pattern. Check the path and the working directory."
            )
        found += matches
    for path in found:
        if not _is_data(path):
            raise DataError(
                f"files: {os.fspath(path)!r} is no {' or '.join(SUFFIXES)} file, and its ending "
                "says how it is read. Convert or rename it (jsonl: one JSON object a line)."
            )
    return found


def _is_data(path: epath.Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _glob(path: epath.Path) -> list[epath.Path]:
    """Matches of a pattern in the last part of a path, or below its first part with a pattern."""
    parts = path.parts
    first = next(n for n, part in enumerate(parts) if any(c in part for c in "*?["))
    root = path
    for _ in parts[first:]:
        root = root.parent
    return [p for p in root.glob("/".join(parts[first:])) if p.name.endswith(SUFFIXES)]


class Rows:
    """All rows of some files, by number. Threads may share one; a copy is sent to processes."""

    def __init__(self, files: Sequence["_JsonLines | _Parquet | _InMemory"]):
        self._files = tuple(files)
        self._starts = np.cumsum([0, *(len(file) for file in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, inside = self._files[which], int(index - self._starts[which])
        return Row(file=file.name, index=inside, fields=file.read(inside))

    def __repr__(self) -> str:
        return f"Rows({len(self)})"


def open_rows(files: Sequence[epath.Path] | Sequence[Mapping[str, Any]]) -> Rows:
    """Rows of files, or of mappings in memory.

    Raises:
        DataError: a file that cannot be parsed, or no row at all.
        CheckpointError: a file that cannot be read.
    """
    if files and isinstance(files[0], Mapping):
        return Rows([_InMemory(files)])  # pyright: ignore[reportArgumentType]
    opened = [
        _Parquet(os.fspath(file)) if file.name.endswith(".parquet") else _JsonLines(os.fspath(file))
        for file in map(epath.Path, files)  # pyright: ignore[reportArgumentType]
    ]
    rows = Rows(opened)
    if not len(rows):
        names = ", ".join(file.name for file in opened) or "the list of rows"
        raise DataError(f"There are no rows in {names}: expected at least one. Check the files.")
    return rows


class _InMemory:
    name = "rows"

    def __init__(self, rows: Sequence[Any]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]


class _File:
    """A file that is opened when it is needed, once a process."""

    def __init__(self, name: str):
        self.name = name
        self._lock = threading.Lock()
        self._handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            with contextlib.suppress(Exception):
                self._handle.close()

    def _open(self) -> Any:
        if self._handle is None:
            self._handle = epath.Path(self.name).open("rb")
        return self._handle


class _JsonLines(_File):
    """One JSON object a line; blank lines are skipped. Offsets are found in one pass."""

    def __init__(self, name: str):
        super().__init__(name)
        starts, ends, at, rest = [], [], 0, b""
        with reading(name), epath.Path(name).open("rb") as file:
            while chunk := file.read(1 << 22):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        starts.append(at)
                        ends.append(at + len(line))
                    at += len(line) + 1
        if rest.strip():  # the last line need not end
            starts.append(at)
            ends.append(at + len(rest))
        self._spans = np.array([starts, ends], np.int64)

    def __len__(self) -> int:
        return self._spans.shape[1]

    def read(self, index: int) -> Mapping[str, Any]:
        start, end = map(int, self._spans[:, index])
        with reading(self.name), self._lock:
            file = self._open()
            file.seek(start)
            data = file.read(end - start)
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise DataError(
                f"{self.name}, row {index}: expected one JSON object on the line, got what is not "
                f"JSON ({error}). Mend or remove the line."
            ) from error
        if not isinstance(fields, Mapping):
            raise DataError(
                f"{self.name}, row {index}: expected a JSON object, got {type(fields).__name__}. "
                'A row looks like {"prompt": ..., "response": ...}.'
            )
        return fields


class _Parquet(_File):
    """Row groups are decoded when a row of theirs is asked for; the last two are kept."""

    def __init__(self, name: str):
        import pyarrow

        super().__init__(name)
        try:
            with reading(name):
                metadata = self._parquet().metadata
        except ValueError as error:
            if isinstance(error.__cause__, pyarrow.ArrowException):
                raise DataError(
                    f"{name}: expected a parquet file, got one that cannot be parsed "
                    f"({error.__cause__}). Write or fetch it again."
                ) from error
            raise
        groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *groups])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reader": None, "_decoded": {}}

    def _parquet(self) -> Any:
        import pyarrow.parquet

        if getattr(self, "_reader", None) is None:
            self._reader = pyarrow.parquet.ParquetFile(self._open())
            self._decoded: dict[int, Any] = {}
        return self._reader

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        with reading(self.name), self._lock:
            reader = self._parquet()
            table = self._decoded.pop(group, None)
            if table is None:
                table = reader.read_row_group(group)
            self._decoded[group] = table  # the newest last
            while len(self._decoded) > 2:
                self._decoded.pop(next(iter(self._decoded)))
        return table.slice(index - int(self._starts[group]), 1).to_pylist()[0]
