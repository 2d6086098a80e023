"""Records of parquet and JSON files, by number, each with the place that it is from.

    .parquet            a record a row
    .jsonl .ndjson      a record a line: a JSON object
    .json, no ending    the same, or one list of objects

Files may be local or in a bucket. A jsonl file's records are found in one pass over its bytes and
parsed when they are asked for; of a parquet file two row groups are decoded at a time.
"""

import array
import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from swaa_jax.documents import problem_within
from swaa_jax.fields import describe, show
from swaa_jax.parquet import problem_with_groups, said_once, without_invented_nulls
from swaa_jax.storage import CheckpointError, is_local, reading

__all__ = [
    "SHIPPED",
    "DataError",
    "Record",
    "Records",
    "are_files",
    "find_files",
    "open_records",
    "records_of",
]

# What a directory or a pattern means; a file that is named may also be .json, or have no ending.
_USUAL = (".parquet", ".jsonl", ".ndjson")
_ENDINGS = (*_USUAL, ".json", "")
_LONGEST = 400  # characters of names in a message

_ASSETS = epath.resource_path("swaa_jax") / "assets"
SHIPPED = {name: _ASSETS / f"{name}.jsonl" for name in ("tiny-needles", "tiny-needles-held-out")}
"""Files inside this package, by the name that stands for them: needles for tiny-retriever."""

T = TypeVar("T")


class DataError(ValueError):
    """Data that cannot be used. One paragraph: which file and record, what was expected, what was
    found, and what to do next.

    >>> records_of([{"prompt": "2 + 2?"}])[0].text("answer")
    Traceback (most recent call last):
        ...
    swaa_jax.records.DataError: the list of records, record 0: expected answer, ...
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A record and where it is from.

    Attributes:
        file: the path, as messages name it.
        index: its number in the file, from 0.
        fields: column to value.
        line: of a file of JSON lines, from 1.

    Examples:
        >>> record = Record(file="mine.jsonl", index=2, fields={"prompt": "2 + 2?"}, line=3)
        >>> record.text("prompt"), record.place
        ('2 + 2?', 'mine.jsonl, record 2 (line 3)')
    """

    file: str
    index: int
    fields: Mapping[str, object]
    line: int | None = None

    @property
    def place(self) -> str:
        """For messages: ``data.jsonl, record 3 (line 4)``."""
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.file}, record {self.index}{line}"

    @property
    def columns(self) -> str:
        """For messages: the columns' names, the first twenty, in at most 400 characters."""
        names = list(self.fields)
        shown = ", ".join([*map(show, names[:20]), *(["..."] if len(names) > 20 else [])])
        return (shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}...") or "none"

    def wrong(self, column: str, expected: str, got: object) -> DataError:
        """The error of a column that holds something else; `got` is the value."""
        return DataError(f"{self.place}: {column}: expected {expected}, got {describe(got)}")

    def missing(self, expected: str, advice: str = "") -> DataError:
        """The error of columns that are not there."""
        return DataError(
            f"{self.place}: expected {expected}, got the columns {self.columns}"
            f"{advice and f'; {advice}'}"
        )

    def value(self, column: str) -> Any:
        """What the column holds, which may be null."""
        if column not in self.fields:
            raise self.missing(f"{column}, which is not there")
        return self.fields[column]

    def text(self, column: str) -> str:
        """A text that is not blank."""
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(column, "a text that is not empty", value)
        return value

    def items(self, column: str, kind: type[T], expected: str) -> list[T]:
        """A list of that type's values; `expected` names them, in the plural."""
        value = self.value(column)
        if not isinstance(value, list):
            raise self.wrong(column, f"a list of {expected}", value)
        for at, item in enumerate(value):
            if not isinstance(item, kind):
                raise self.wrong(f"{column}[{at}]", expected.removesuffix("s"), item)
        return value


class Records:
    """All records of some files, by number. Threads may share one; processes get a copy.

    >>> records = records_of([{"prompt": "2 + 2?"}, {"prompt": "3 + 3?"}])
    >>> len(records), records[1].fields
    (2, {'prompt': '3 + 3?'})
    """

    def __init__(self, files: Sequence["_JsonLines | _Parquet | _InMemory"]):
        self._files = tuple(files)
        self._starts = np.cumsum([0, *(len(file) for file in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: expected 0 to {len(self)} (exclusive)")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[which].read(int(index - self._starts[which]))

    def __repr__(self) -> str:
        return f"Records({len(self)})"


def are_files(data: object) -> bool:
    """Whether data is a path, or a list of paths, rather than records in memory.

    >>> are_files("mine.jsonl"), are_files(["a.parquet", "b.parquet"]), are_files([{"prompt": ""}])
    (True, True, False)
    """
    several = data if isinstance(data, list | tuple) and data else [data]
    return all(isinstance(one, str | os.PathLike) for one in several)


def find_files(patterns: Sequence[epath.PathLike]) -> list[epath.Path]:
    """The files that are meant, in the order given, those of a directory or pattern sorted.

    Args:
        patterns: files, directories of them, or glob patterns; local or ``gs://``. Or names of
            `SHIPPED`, unless there is a file of that name.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: no path at all, or a file of a kind that is not read.
        CheckpointError: a path that cannot be looked at (a bucket without access, say).

    Examples:
        >>> [path.name for path in find_files(["tiny-needles"])]  # a shipped one
        ['tiny-needles.jsonl']
    """
    if not patterns:
        raise DataError("files: expected at least one parquet or jsonl file, got none")
    found: list[epath.Path] = []
    for pattern in patterns:
        pattern = os.fspath(pattern)
        if pattern in SHIPPED and not os.path.exists(pattern):
            found.append(SHIPPED[pattern])
            continue
        with reading(pattern):
            path = epath.Path(pattern).expanduser()
            if any(c in pattern for c in "*?["):
                usual = (*_USUAL, ".json") if pattern.endswith(".json") else _USUAL
                matches = sorted((p for p in _glob(path) if p.name.endswith(usual)), key=str)
            elif path.is_dir():
                matches = sorted((p for p in path.iterdir() if _is_usual(p)), key=str)
            else:
                matches = [path] if path.exists() else []
        if not matches:
            on_hub = re.fullmatch(r"[\w.-]+/[\w-]+", pattern) and not os.path.isdir(pattern)
            loaded = f"; a dataset of the hub is data=datasets.load_dataset({show(pattern)}, ...)"
            raise FileNotFoundError(
                f"files: expected a {', '.join(_USUAL)} or .json file, a directory of them, or a "
                f"glob pattern, got {show(pattern)}, where nothing is; the working directory is "
                f"{os.getcwd()}{loaded if on_hub else ''}"
            )
        found += matches
    for path in found:
        if path.suffix not in _ENDINGS:
            raise DataError(
                f"files: expected a file that ends in .parquet or .jsonl or .json, got "
                f"{show(os.fspath(path))}; convert or rename it (jsonl: one JSON object a line), "
                "or give what pandas reads of it"
            )
    return found


def _is_usual(path: epath.Path) -> bool:
    return path.name.endswith(_USUAL) and not path.name.startswith(".")


def _glob(path: epath.Path) -> Iterator[epath.Path]:
    """Matches of a pattern in the last part of a path, or below its first part with a pattern."""
    parts = path.parts
    first = next(n for n, part in enumerate(parts) if any(c in part for c in "*?["))
    root = path
    for _ in parts[first:]:
        root = root.parent
    return root.glob("/".join(parts[first:]))


def open_records(files: Sequence[epath.PathLike]) -> Records:
    """The records of files; see `find_files`.

    Raises:
        DataError: a file that is not what its name says, or no record at all.
        CheckpointError: a file that cannot be read.

    Examples:
        >>> sorted(open_records(find_files(["tiny-needles"]))[0].fields)
        ['answer', 'prompt', 'response']
    """
    return _records([_open(os.fspath(file)) for file in files])


def records_of(data: Any, *, name: str = "data") -> Records:
    """Records that are in memory.

    Args:
        data: a list (or an iterable) of mappings, a Hugging Face `datasets.Dataset`, a pandas frame
            or a pyarrow table.
        name: the argument's, for messages.

    Raises:
        DataError: there are none, or it is something else: the message says what to do with it.

    Examples:
        >>> records_of([{"prompt": "1 + 1 =", "answer": "2"}])[0].text("answer")
        '2'
    """
    return _records([_InMemory("the list of records", _mappings(name, data))])


def _mappings(name: str, data: Any) -> Any:
    """The records of an object, by number: a list, or what has a length and is indexed alike."""
    expected = "a list of records, a datasets.Dataset or a pandas frame"
    if isinstance(data, Mapping):
        splits = [key for key, value in data.items() if hasattr(value, "column_names")]
        advice = f"take one split, {name}[{splits[0]!r}]" if splits else 'write [{"prompt": ...}]'
        raise DataError(f"{name}: expected {expected}, got a {type(data).__name__}; {advice}")
    if hasattr(data, "to_pylist"):  # pyarrow's
        return data.to_pylist()
    if hasattr(data, "columns") and callable(getattr(data, "to_dict", None)):  # a frame of pandas'
        records = data.to_dict("records")
        return [{str(name): _plain(value) for name, value in one.items()} for one in records]
    if hasattr(data, "column_names") and not hasattr(data, "__len__"):
        raise DataError(
            f"{name}: expected {expected}, got a {type(data).__name__}, which has no length; take "
            f"some of it, list({name}.take(1000))"
        )
    if isinstance(data, str | bytes) or hasattr(data, "read") or not isinstance(data, Iterable):
        advice = "; give its path" if hasattr(data, "read") else ""
        raise DataError(f"{name}: expected {expected}, got {describe(data)}{advice}")
    return data if hasattr(data, "__getitem__") and hasattr(data, "__len__") else list(data)


def _plain(value: Any) -> Any:
    """A frame's cell as Python has it: lists for arrays, however deep."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _records(files: Sequence["_JsonLines | _Parquet | _InMemory"]) -> Records:
    records = Records(files)
    if not len(records):
        names = ", ".join(file.name for file in files) or "no file"
        raise DataError(f"{names}: expected at least one record, got none; give some")
    return records


def _open(name: str) -> "_JsonLines | _Parquet | _InMemory":
    if is_local(name) and os.path.exists(name) and not os.path.isfile(name):
        raise DataError(f"{name}: expected a regular file, got a pipe or a device; write a file")
    if name.endswith(".parquet"):
        return _Parquet(name)
    with reading(name), epath.Path(name).open("rb") as file:
        start = file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip()
        if not start.startswith(b"["):
            return _JsonLines(name)
        file.seek(0)
        data = file.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        return _InMemory(name, json.loads(data))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: expected a JSON list, got what is not JSON ({_reason(error)})"
        ) from error


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(name: str, index: int, fields: Any, line: int | None = None) -> Record:
    record = Record(file=name, index=index, fields=fields, line=line)
    if not isinstance(fields, Mapping):
        raise DataError(
            f"{record.place}: expected a JSON object, got {describe(fields)}; a record looks like "
            '{"prompt": ..., "response": ...}'
        )
    for column, value in record.fields.items():
        if problem := problem_within((column, value)):
            raise DataError(f"{record.place}: {show(column)}: {problem}; mend or remove the record")
    return record


class _InMemory:
    def __init__(self, name: str, records: Sequence[object]):
        self.name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Record:
        return _checked(self.name, index, self._records[index])


class _File:
    """A file that is opened when it is needed, once a process."""

    def __init__(self, name: str):
        self.name = name
        self._lock = threading.Lock()
        self._handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_handle": None}

    def __setstate__(self, state: dict[str, object]) -> None:
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
        spans, at, number = array.array("q"), 0, 0
        length, is_blank = 0, True  # of the line at hand, which may be as long as the file
        with reading(name), epath.Path(name).open("rb") as file:
            while chunk := file.read(1 << 22):
                for index, piece in enumerate(chunk.split(b"\n")):
                    if index:  # a line has ended before this piece
                        number += 1
                        if not is_blank:
                            spans.extend((at, at + length, number))
                        at += length + 1
                        length, is_blank = 0, True
                    length += len(piece)
                    is_blank = is_blank and not piece.strip()
        if not is_blank:  # the last line need not end
            spans.extend((at, at + length, number + 1))
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> Record:
        start, end, line = map(int, self._spans[index])
        with reading(self.name), self._lock:
            file = self._open()
            file.seek(start)
            data = file.read(end - start)
        try:
            fields = json.loads(data.removeprefix(b"" if start else _BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            place = Record(file=self.name, index=index, fields={}, line=line).place
            raise DataError(
                f"{place}: expected a JSON object on the line, got what is not JSON "
                f"({_reason(error)}); mend or remove the line"
            ) from error
        return _checked(self.name, index, fields, line)


class _Parquet(_File):
    """Row groups are decoded when a row of theirs is asked for; the last two are kept."""

    def __init__(self, name: str):
        import pyarrow

        super().__init__(name)
        try:
            with reading(name):
                metadata = self._parquet().metadata
        except CheckpointError as error:
            cause = error.__cause__ or error
            if isinstance(cause, pyarrow.ArrowException):
                raise DataError(
                    f"{name}: expected a parquet file, got one that cannot be parsed "
                    f"({_reason(cause)}); write or fetch it again"
                ) from error
            raise
        groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        with reading(name):
            size = epath.Path(name).stat().length
        if problem := problem_with_groups(groups, size):
            raise DataError(f"{name}: {problem}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reader": None, "_decoded": {}}

    def _parquet(self) -> Any:
        import pyarrow.parquet

        if getattr(self, "_reader", None) is None:
            file = self._open()
            metadata = pyarrow.parquet.read_metadata(file)
            # What the file says once stays so in memory: a short file may name a long text often.
            self._reader = pyarrow.parquet.ParquetFile(
                file, metadata=metadata, read_dictionary=said_once(metadata)
            )
            self._decoded: dict[int, Any] = {}
        return self._reader

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Record:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        with reading(self.name), self._lock:
            reader = self._parquet()
            table = self._decoded.pop(group, None)
            if table is None:
                table = reader.read_row_group(group)
            self._decoded[group] = table  # the newest last
            while len(self._decoded) > 2:
                self._decoded.pop(next(iter(self._decoded)))
        row = table.slice(index - int(self._starts[group]), 1)
        try:
            (fields,) = row.to_pylist()
        except UnicodeDecodeError as error:
            place = Record(file=self.name, index=index, fields={}).place
            raise DataError(
                f"{place}: expected Unicode text, got bytes that are not UTF-8 ({_reason(error)}); "
                "write the file again with the text decoded"
            ) from error
        fields = {
            field.name: without_invented_nulls(fields[field.name], field.type)
            for field in row.schema
        }
        return _checked(self.name, index, fields)
