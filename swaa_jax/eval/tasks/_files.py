"""Tasks that read files: rows of parquet or JSON, and what is wrong with them."""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from etils import epath

from swaa_jax._policy_fields import field_setter, integer
from swaa_jax.eval.tasks.task import Task
from swaa_jax.typing import PathLike

__all__ = ["FileTask", "Row", "read_rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row, with where it is from.

    Attributes:
        file: its path.
        number: its place there, from 0.
        fields: its columns.
        line: of a file of JSON lines, from 1.
    """

    file: str
    number: int
    fields: Mapping[str, Any]
    line: int | None = None

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        return _place(self.file, self.number, self.line)

    def wrong(self, field: str, expected: str, got: Any) -> ValueError:
        """The error of a field that holds something else; `got` is the value."""
        return ValueError(f"{self.place}: {field}: expected {expected}, got {_shown(got)}")

    def missing(self, expected: str) -> ValueError:
        """The error of fields that are not there."""
        there = ", ".join(map(str, self.fields)) or "none"
        return ValueError(f"{self.place}: expected {expected}, got the columns {there}")

    def value(self, field: str) -> Any:
        """What the field holds, which may be null."""
        if field not in self.fields:
            raise self.missing(f"{field}, which is not there")
        return self.fields[field]

    def text(self, field: str) -> str:
        """A text that is not blank."""
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "a text that is not empty", value)
        return value

    def items(self, field: str, kind: type, expected: str) -> list[Any]:
        """A list of that type's values."""
        value = self.value(field)
        if not isinstance(value, list):
            raise self.wrong(field, f"a list of {expected}", value)
        for at, item in enumerate(value):
            if not isinstance(item, kind):
                raise self.wrong(f"{field}[{at}]", expected.removesuffix("s"), item)
        return value

    def answer(self, field: str, value: Any) -> str:
        """An answer as text; numbers are written out."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and (not isinstance(value, str) or not value.strip()):
            raise self.wrong(field, "an answer, a text or a number", value)
        return str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A task whose samples are rows of files.

    Attributes:
        files: a path or several, local or gs://: .parquet, .jsonl, or .json (a list or lines).
        limit: at most so many samples; None: all.

    Raises:
        ValueError: no files, or a limit below 1.
    """

    files: PathLike | Sequence[PathLike]
    limit: int | None = None

    def __post_init__(self) -> None:
        put = field_setter(self)
        files = [self.files] if isinstance(self.files, str | os.PathLike) else self.files
        are_paths = isinstance(files, Sequence) and all(
            isinstance(file, str | os.PathLike) for file in files
        )
        if not files or not are_paths:
            raise ValueError(f"files: expected a path or several, got {_shown(self.files)}")
        put("files", tuple(os.fspath(file) for file in files))
        if self.limit is not None:
            put("limit", integer("limit", self.limit, minimum=1))

    @property
    def paths(self) -> tuple[str, ...]:
        """The files."""
        return tuple(os.fspath(file) for file in cast(Sequence[PathLike], self.files))

    def check(self) -> None:
        """See `Task.check`."""
        for file in self.paths:
            if not epath.Path(file).exists():
                raise FileNotFoundError(
                    f"files: expected a file that is there, got {file}; the directory is "
                    f"{os.getcwd()}"
                )

    def rows(self) -> Iterator[Row]:
        """The rows of all files, in order.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: see :func:`read_rows`.
        """
        for file in self.paths:
            yield from read_rows(file)


def read_rows(path: PathLike) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: ends in .parquet, or in .jsonl or .json (a list, or an object a line), or has no
            ending and is read as JSON; local or gs://.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, one without rows, or one that is not what its name says.
    """
    name, path = os.fspath(path), epath.Path(path)
    if path.suffix == ".parquet":
        found = _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json", ""):
        found = _json_rows(path)
    else:
        raise ValueError(f"{name}: expected a file that ends in .parquet or .jsonl or .json")
    number = -1
    for number, (line, fields) in enumerate(found):
        if not isinstance(fields, Mapping):
            raise ValueError(
                f"{_place(name, number, line)}: expected an object with named fields, got "
                f"{_shown(fields)}"
            )
        yield Row(file=name, number=number, fields=fields, line=line)
    if number < 0:
        raise ValueError(f"{name}: expected at least one question, got an empty file")


def _place(file: str, number: int, line: int | None) -> str:
    return f"{file}, row {number}" + ("" if line is None else f" (line {line})")


def _parquet_rows(path: epath.Path) -> Iterator[tuple[None, Any]]:
    """Rows; none has a line."""
    import pyarrow.parquet

    data = io.BytesIO(path.read_bytes())
    try:
        for batch in pyarrow.parquet.ParquetFile(data).iter_batches(256):
            yield from ((None, row) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected parquet, got something else: {error}") from None


def _json_rows(path: epath.Path) -> Iterator[tuple[int | None, Any]]:
    """Lines from 1, of a list none, and rows."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if data[:64].lstrip().startswith(b"["):
        try:
            rows = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{path}: expected a JSON list: {error}") from None
        yield from ((None, row) for row in rows)
        return
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object a line: {error}"
            ) from None
        yield number, row


def _shown(value: Any) -> str:
    """A value, cut short, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '...'} ({type(value).__name__})"
