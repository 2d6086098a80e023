"""Questions with right answers, from parquet or JSON: your own data.

A row has ``prompt``, or ``context`` and ``question``, or ``messages`` (a chat that ends with the
user's); and ``answer``, a text, a number or a list of them (``answers`` or ``references`` will do).
``id``, ``_id`` or ``question_id`` names it, else its number. ``type``, ``kind`` or
``question_type``, if it is there, is what results are broken down by. ``question`` beside
``prompt`` or ``messages`` is what reports and judges show in their place.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath

from swaa_jax._policy_fields import integer
from swaa_jax.eval.tasks._files import FileTask, Row, read_rows
from swaa_jax.eval.tasks.task import Sample
from swaa_jax.typing import PathLike

__all__ = ["QaTask", "Question", "read_questions"]

_ANSWERS = ("answer", "answers", "references")
_IDS = ("id", "_id", "question_id")
_KINDS = ("type", "kind", "question_type")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and what would be right.

    Attributes:
        id: names it in the results.
        prompt: what the user says, without any template; the last time, where there are messages.
        references: right answers.
        question: the question without its context, where the row has it apart.
        kind: what results are broken down by.
        messages: the chat; empty where it is the prompt alone.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    question: str = ""
    kind: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


def read_questions(path: PathLike, *, limit: int | None = None) -> list[Question]:
    """The questions of a file.

    Args:
        path: ends in .parquet, .jsonl or .json; local or gs://.
        limit: the first so many; None: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no rows, or a row that lacks a question or an answer.
    """
    if limit is not None:
        limit = integer("limit", limit, minimum=1)
    return [_question(row, row.number) for row in itertools.islice(read_rows(path), limit)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaTask(FileTask):
    """Questions of your own; this module's first lines say what a row has.

    Attributes:
        files: a path or several, local or gs://.
        limit: at most so many samples; None: all.
    """

    name: ClassVar[str] = "qa"
    judge: ClassVar[Mapping[str, Any]] = {"name": "includes"}
    max_new_tokens: ClassVar[int] = 512

    @property
    def label(self) -> str:
        """With the first file's name."""
        return f"{self.name} {epath.Path(self.paths[0]).stem}"

    def check(self) -> None:
        """See `Task.check`: every row is read."""
        super().check()
        self.samples(None, thinking=False)

    def samples(self, tokenizer: Any, *, thinking: bool) -> list[Sample]:
        """See `Task.samples`."""
        del tokenizer, thinking
        found = []
        for number, row in enumerate(itertools.islice(self.rows(), self.limit)):
            question = _question(row, number)
            found.append(
                Sample(
                    id=question.id,
                    messages=question.messages or ({"role": "user", "content": question.prompt},),
                    references=question.references,
                    question=question.question or question.prompt,
                    kind=question.kind,
                )
            )
        return found


def _question(row: Row, number: int) -> Question:
    messages: tuple[Mapping[str, str], ...] = ()
    if _is_given(row, "messages"):
        messages = _messages(row)
        prompt = messages[-1]["content"]
    elif _is_given(row, "prompt"):
        prompt = row.text("prompt")
    elif _is_given(row, "question"):
        names = [name for name in ("context", "question") if _is_given(row, name)]
        prompt = "\n\n".join(row.text(name) for name in names)
    else:
        raise row.missing("prompt, or context and question, or messages, not empty")
    name = next((name for name in _ANSWERS if _is_given(row, name)), None)
    if name is None:
        there = next((name for name in _ANSWERS if name in row.fields), None)
        if there is not None:
            raise row.wrong(there, "an answer that is not empty", row.fields[there])
        raise row.missing("answer, not empty")
    answers = row.fields[name]
    if not isinstance(answers, list):
        answers = [answers]
    return Question(
        id=str(_first(row, _IDS, number)),
        prompt=prompt,
        references=tuple(row.answer(name, answer) for answer in answers),
        question=row.text("question") if _is_given(row, "question") else "",
        kind=str(_first(row, _KINDS, "")),
        messages=messages,
    )


def _messages(row: Row) -> tuple[Mapping[str, str], ...]:
    messages = row.items("messages", dict, "mappings of role and content")
    for at, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or not message[key].strip():
                raise row.wrong(
                    f"messages[{at}].{key}", "a text that is not empty", message.get(key)
                )
    if messages[-1]["role"] != "user":
        raise row.wrong(
            "messages", "the last one to be the user's, to be answered", messages[-1]["role"]
        )
    return tuple({key: message[key] for key in ("role", "content")} for message in messages)


def _is_given(row: Row, name: str) -> bool:
    return row.fields.get(name) not in (None, "", [])


def _first(row: Row, names: tuple[str, ...], default: Any) -> Any:
    """The first of the fields that is there."""
    for name in names:
        if _is_given(row, name):
            if not isinstance(row.fields[name], str | int | float):
                raise row.wrong(name, "a text or a number", row.fields[name])
            return row.fields[name]
    return default
