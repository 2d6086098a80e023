"""What a record asks and what it answers: one convention of columns for every data file.

Training, evaluation, distillation and the selection of layers read the same files:

    ask       messages (or conversations): a chat, role/content or from/value, perhaps as JSON text
              prompt: a text, or a list of messages
              instruction, and perhaps input, which follows after a blank line
              question, and perhaps context, which stands before it
              system: what stands above all of these
              history: turns before, [[asked, answered], ...] or messages
    answer    response (or completion; output with an instruction): what the model is to say,
              text or messages
              answer (or answers, references): what is right, a text, a number or a list of them
    more      tools; id (or _id, question_id); type (or kind, question_type)

A message may say whether it is trained on: `train` (true or false), or OpenAI's `weight` (0 or 1).

Who wants a response and finds none takes the first right answer, and who wants right answers and
finds none takes the response. A chat that ends with the assistant's message has its response there.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from swaa_jax.chats import ChatError, Message, Tools, normal_messages, normal_tools
from swaa_jax.documents import parse_json
from swaa_jax.fields import nearest
from swaa_jax.records import DataError, Record

__all__ = ["COLUMNS", "FORMATS", "Example", "is_nan", "read_example", "warn_unused"]

log = logging.getLogger(__name__)

_SHOWN, _LONGEST_WARNING = 20, 400

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "instruction": ("instruction",),
    "input": ("input",),
    "question": ("question",),
    "context": ("context",),
    "system": ("system",),
    "history": ("history",),
    "response": ("response", "completion"),
    "output": ("output",),
    "answer": ("answer", "answers", "references"),
    "tools": ("tools",),
    "id": ("id", "_id", "question_id"),
    "kind": ("type", "kind", "question_type"),
}
"""What a record can hold, by our names, and the columns that it is looked for in.

>>> COLUMNS["response"]
('response', 'completion')
"""

FORMATS: Mapping[str, str] = {
    "chat": "messages",
    "prompt": "prompt",
    "instruction": "instruction",
    "question": "question",
}
"""How a record can ask, and the column that it needs for that; the first that is there counts.

>>> FORMATS["chat"]
'messages'
"""

_SYSTEMS = ("system", "developer")
_ALWAYS_USED = ("system", "history", "answer", "tools", "id", "kind", "question")
_USED = {
    "chat": (*_ALWAYS_USED, "messages", "response"),
    "prompt": (*_ALWAYS_USED, "prompt", "response"),
    "instruction": (*_ALWAYS_USED, "instruction", "input", "output"),
    "question": (*_ALWAYS_USED, "context", "response"),
}
"""What is looked at, by how a record asks."""


@dataclasses.dataclass(frozen=True)
class Example:
    """What a record says; a column is looked at when it is asked for.

    Attributes:
        record: where it is from.
        columns: our name to the record's column, of what is there and not empty.
        format: which shape it has, one of `FORMATS`.

    Examples:
        >>> record = Record(file="mine.jsonl", index=0, fields={"prompt": "2 + 2?", "seen": "yes"})
        >>> example = read_example(record)
        >>> example.asked, example.unused
        (({'role': 'user', 'content': '2 + 2?'},), ('seen',))
    """

    record: Record
    columns: Mapping[str, str]
    format: str

    @functools.cached_property
    def asked(self) -> tuple[Message, ...]:
        """The messages that are to be answered."""
        if self.format == "chat":
            asked = self._chat[0]
        elif self.text is None:
            asked = _messages(self.record, self.columns["prompt"])
        else:
            asked = ({"role": "user", "content": self.text},)
        history, system = self._history, self._system
        for first in (asked, history):
            if not first or first[0]["role"] not in _SYSTEMS:
                continue
            if system:
                raise self.record.wrong(
                    self.columns["system" if "system" in self.columns else "history"],
                    "one system's message, here or as the first of the messages",
                    system[0]["content"],
                )
            system = first[:1]
        said = [one for one in (*history, *asked) if not any(one is first for first in system)]
        return (*system, *said)

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that hold something and are not looked at, or not to their end."""
        used = {self.columns[name] for name in _USED[self.format] if name in self.columns}
        names = [
            name
            for name, value in self.record.fields.items()
            if name not in used and not _is_empty(value)
        ]
        if self.format == "chat" and self._chat[1]:
            column = self.columns["messages"]
            if _messages(self.record, column)[-1]["role"] != "assistant":
                names.append(f"{column} after the last answer")
        for name in used & {self.columns.get("response"), self.columns.get("output")}:
            said = self.record.fields[name]
            if _is_messages(said) and _messages(self.record, name)[-1]["role"] != "assistant":
                names.append(f"{name} after the last answer")
        return tuple(names)

    @functools.cached_property
    def text(self) -> str | None:
        """The user's message, where all that is asked is one text."""
        parts = {
            "prompt": ("prompt",),
            "instruction": ("instruction", "input"),
            "question": ("context", "question"),
        }.get(self.format, ())
        if not parts or _is_messages(self._value("prompt")):
            return None
        return "\n\n".join(self.record.text(self.columns[p]) for p in parts if p in self.columns)

    @functools.cached_property
    def response(self) -> tuple[Message, ...]:
        """What the model is to say: the record's response, else the first right answer.

        Raises:
            DataError: the record has neither.
        """
        if said := self._said:
            return said
        if self.references:
            return ({"role": "assistant", "content": self.references[0]},)
        raise self.record.missing(
            "an answer, as response, answer or the assistant's last message",
            "remove the record, or name the column that has it, columns: {response: ...}",
        )

    @functools.cached_property
    def right_answers(self) -> tuple[str, ...]:
        """What is right: the record's right answers, else its response.

        Raises:
            DataError: the record has neither.
        """
        if self.references:
            return self.references
        own = [message for message in self._said if message["role"] == "assistant"]
        said = own[-1]["content"] if own else None
        if isinstance(said, str) and said.strip():
            return (said,)
        raise self.record.missing(
            "an answer that is not empty",
            "give answer, a text or a list of texts of which any one is right",
        )

    @functools.cached_property
    def references(self) -> tuple[str, ...]:
        """Right answers; none where the record has none."""
        value = self._value("answer")
        answers = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(_answer(self.record, self.columns["answer"], answer) for answer in answers)

    @property
    def question(self) -> str:
        """A short form of what is asked, where the record has one in addition."""
        return self.record.text(self.columns["question"]) if "question" in self.columns else ""

    @property
    def id(self) -> str | None:
        """Names the record; None where it has no name."""
        return self._name("id")

    @property
    def kind(self) -> str:
        """What it is one of; nothing where the record does not say."""
        return self._name("kind") or ""

    @functools.cached_property
    def tools(self) -> Tools:
        """What the chat template is told of."""
        try:
            return normal_tools(self._value("tools"), self.columns.get("tools", "tools"))
        except ChatError as error:
            raise DataError(f"{self.record.place}: {error}") from error

    @functools.cached_property
    def _chat(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """A chat's messages before the response, and the response if it is there."""
        messages = _messages(self.record, self.columns["messages"])
        if messages[-1]["role"] != "assistant" and self.columns.keys() & {"response", "answer"}:
            return messages, ()
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return messages, ()
        last = messages[answers[-1]]
        return messages[: answers[-1]], (last,) if _has_text(last) else ()

    @functools.cached_property
    def _said(self) -> tuple[Message, ...]:
        name = "output" if self.format == "instruction" else "response"
        value = self._value(name)
        if self.format == "chat" and self._chat[1]:
            if value not in (None, self._chat[1][0]["content"]):
                expected = "one answer, here or as the last message of the assistant"
                raise self.record.wrong(self.columns[name], expected, value)
            return self._chat[1]
        if value is None:
            return ()
        if _is_messages(value):
            said = _messages(self.record, self.columns[name])
            if not any(message["role"] == "assistant" and _has_text(message) for message in said):
                expected = "a message of the assistant with some text"
                raise self.record.wrong(self.columns[name], expected, value)
            return said
        return ({"role": "assistant", "content": _answer(self.record, self.columns[name], value)},)

    @property
    def _system(self) -> tuple[Message, ...]:
        if "system" not in self.columns:
            return ()
        return ({"role": "system", "content": self.record.text(self.columns["system"])},)

    @property
    def _history(self) -> tuple[Message, ...]:
        if "history" not in self.columns:
            return ()
        column = self.columns["history"]
        value = self._value("history")
        turns = _parsed(value) if isinstance(value, str) else value
        if _is_messages(turns):
            return _messages(self.record, column)
        messages = []
        for at, turn in enumerate(turns if isinstance(turns, list | tuple) else [turns]):
            is_pair = isinstance(turn, list | tuple) and len(turn) == 2
            if not is_pair or not all(isinstance(text, str) for text in turn):
                raise self.record.wrong(f"{column}[{at}]", "a pair of texts, or messages", turn)
            messages += [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
        return tuple(messages)

    def _value(self, name: str) -> Any:
        return self.record.fields[self.columns[name]] if name in self.columns else None

    def _name(self, name: str) -> str | None:
        value = self._value(name)
        if value is not None and not isinstance(value, str | int | float):
            raise self.record.wrong(self.columns[name], "a text or a number", value)
        return None if value is None else str(value)


def read_example(
    record: Record, *, columns: Mapping[str, str] | None = None, shape: str = "auto"
) -> Example:
    """Finds what a record asks and answers.

    Args:
        record: of any of the shapes above.
        columns: names of columns that are not the usual ones, ``{"response": "generated"}``.
        shape: one of `FORMATS`; "auto": by the columns that are there.

    Raises:
        DataError: nothing is asked, or a column that was named is not there.

    Examples:
        >>> record = Record(file="mine.jsonl", index=0, fields={"question": "2 + 2?", "answer": 4})
        >>> read_example(record).format
        'question'
    """
    given = _given(record, columns or {})
    if shape == "auto":
        shape = next((name for name, column in FORMATS.items() if column in given), "")
    needed = FORMATS.get(shape)
    if needed not in given:
        every = "prompt, or context and question, or messages, or instruction and input"
        near = "".join(map(_near_column, record.fields))
        raise record.missing(
            f"{needed or every}, not empty",
            f"name the column that has it, columns: {{{needed or 'prompt'}: ...}}{near[:80]}",
        )
    return Example(record, given, shape)


def warn_unused(columns: Iterable[str]) -> None:
    """Says once which columns of the data are not looked at.

    >>> warn_unused(["seen_on"])  # logged
    """
    if names := [repr(name) + _near_column(name) for name in columns]:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        log.warning("columns that are not used: %s", shown[:_LONGEST_WARNING])


def _near_column(name: str) -> str:
    """A hint at the column that is meant where a letter or two are wrong."""
    known = {column for usual in COLUMNS.values() for column in usual}
    return "" if name in known else nearest(name, known, cutoff=0.8)


def _given(record: Record, named: Mapping[str, str]) -> dict[str, str]:
    """The record's columns that are there and not empty, by our names."""
    given = {}
    for name, usual in COLUMNS.items():
        column = named.get(name)
        if column is not None and column not in record.fields:
            raise DataError(
                f"{record.place}: columns: expected {name} in {column!r}, got the columns "
                f"{record.columns}; correct it or leave it out"
            )
        for one in usual if column is None else (column,):
            value = record.fields.get(one)
            if not _is_empty(value):
                given.setdefault(name, one)
    return given


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or is_nan(value)


def is_nan(value: object) -> bool:
    """Whether a value is what tables write where there is none.

    >>> is_nan(float("nan")), is_nan(None)
    (True, False)
    """
    return isinstance(value, float) and math.isnan(value)


def _answer(record: Record, column: str, value: object) -> str:
    """An answer as text; numbers are written out."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_nan(value) or not (is_number or (isinstance(value, str) and value.strip())):
        raise record.wrong(column, "an answer that is not empty, a text or a number", value)
    return str(value)


def _is_messages(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _has_text(message: Message) -> bool:
    return any(message.get(key) for key in ("content", "tool_calls", "reasoning_content"))


def _messages(record: Record, column: str) -> tuple[Message, ...]:
    value: Any = record.fields[column]
    if isinstance(value, str):
        value = _parsed(value)
    if not _is_messages(value):
        expected = "a list of messages, [{role: ..., content: ...}]"
        raise record.wrong(column, expected, record.fields[column])
    try:
        return normal_messages(value, f"{column}[{{}}]")
    except ChatError as error:
        raise DataError(f"{record.place}: {error}") from error


def _parsed(text: str) -> Any:
    """What JSON text holds (parquet files often keep messages and tools so), or the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text
