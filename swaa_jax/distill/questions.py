"""Questions with right answers, from parquet or JSON lines.

A row has ``prompt``, or ``context`` and ``question``; and ``answer``, a text or a list of texts
(``answers`` and ``references`` will do). ``id``, ``_id`` or ``question_id`` names it, else its
number.
"""

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from swaa_jax.typing import PathLike

_ANSWERS = ("answer", "answers", "references")
_IDS = ("id", "_id", "question_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and what would be right.

    Attributes:
        id: names it in the results.
        prompt: what the user says, without any template.
        references: right answers.
    """

    id: str
    prompt: str
    references: tuple[str, ...]


def read_questions(path: PathLike, *, limit: int | None = None) -> list[Question]:
    """The questions of a file.

    Args:
        path: ends in .parquet, .jsonl or .json (lines); local or gs://.
        limit: the first so many; None: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no rows, or a row that lacks a question or an answer.
    """
    questions = []
    for number, row in enumerate(_rows(epath.Path(path))):
        if limit is not None and number >= limit:
            break
        questions.append(_question(row, number, path))
    if not questions:
        raise ValueError(f"{path}: expected at least one question, got an empty file")
    return questions


def _rows(path: epath.Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(path.read_bytes())).iter_batches(256):
            yield from batch.to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        with path.open("r") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number + 1}: expected a JSON object a line: {error}"
                    ) from None
                yield row
    else:
        raise ValueError(f"{path}: expected a file that ends in .parquet or .jsonl")


def _question(row: Mapping[str, Any], number: int, path: PathLike) -> Question:
    found = f"{path}, row {number}: expected {{}}, got the columns {', '.join(row) or 'none'}"
    if row.get("prompt"):
        prompt = row["prompt"]
    elif row.get("question"):
        prompt = "\n\n".join(row[name] for name in ("context", "question") if row.get(name))
    else:
        raise ValueError(found.format("prompt, or context and question"))
    references = next((row[name] for name in _ANSWERS if row.get(name)), None)
    if references is None:
        raise ValueError(found.format("answer, not empty"))
    if isinstance(references, str):
        references = [references]
    identity = next((row[name] for name in _IDS if row.get(name) is not None), number)
    return Question(id=str(identity), prompt=prompt, references=tuple(map(str, references)))
