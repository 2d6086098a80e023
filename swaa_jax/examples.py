"""What a record asks and what it answers: one convention of columns for every data file.

Training, evaluation, distillation and the selection of layers read the same files:

    ask       messages (or conversations): a chat, role/content or from/value, perhaps as JSON text
              prompt: a text, or a list of messages
              instruction, and perhaps input, which follows after a blank line
              question, and perhaps context, which stands before it
              system: what stands above all of these
    answer    response (or completion; output with an instruction): what the model is to say,
              text or messages
              answer (or answers, references): what is right, a text, a number or a list of them
    more      tools; id (or _id, question_id); type (or kind, question_type)

Who wants a response and finds none takes the first right answer, and who wants right answers and
finds none takes the response. A chat that ends with the assistant's message has its response there.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from swaa_jax.records import DataError, Record

__all__ = ["COLUMNS", "FORMATS", "Example", "Message", "Tools", "read_example"]

Message: TypeAlias = Mapping[str, Any]
Tools: TypeAlias = tuple[object, ...] | None

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "instruction": ("instruction",),
    "input": ("input",),
    "question": ("question",),
    "context": ("context",),
    "system": ("system",),
    "response": ("response", "completion"),
    "output": ("output",),
    "answer": ("answer", "answers", "references"),
    "tools": ("tools",),
    "id": ("id", "_id", "question_id"),
    "kind": ("type", "kind", "question_type"),
}
"""What a record can hold, by our names, and the columns that it is looked for in."""

FORMATS: Mapping[str, str] = {
    "chat": "messages",
    "prompt": "prompt",
    "instruction": "instruction",
    "question": "question",
}
"""How a record can ask, and the column that it needs for that; the first that is there counts."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclasses.dataclass(frozen=True)
class Example:
    """What a record says; a column is looked at when it is asked for.

    Attributes:
        record: where it is from.
        columns: our name to the record's column, of what is there and not empty.
        format: which shape it has, one of `FORMATS`.
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
        return (*self._system, *asked)

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
        said = self._said[-1]["content"] if self._said else None
        if isinstance(said, str) and said.strip():
            return (said,)
        raise self.record.missing("an answer that is not empty")

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
        value = self._value("tools")
        if isinstance(value, str):
            value = _parsed(value)
        if value is not None and not isinstance(value, list | tuple):
            raise self.record.wrong(self.columns["tools"], "a list, or its JSON", value)
        return tuple(value) if value else None

    @functools.cached_property
    def _chat(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """A chat's messages before the response, and the response if it is there."""
        messages = _messages(self.record, self.columns["messages"])
        if messages[-1]["role"] == "user" and self.columns.keys() & {"response", "answer"}:
            return messages, ()
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return messages, ()
        last = messages[answers[-1]]
        return messages[: answers[-1]], (last,) if _has_text(last) else ()

    @functools.cached_property
    def _said(self) -> tuple[Message, ...]:
        if self.format == "chat" and self._chat[1]:
            return self._chat[1]
        name = "output" if self.format == "instruction" else "response"
        value = self._value(name)
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
    """
    given = _given(record, columns or {})
    if shape == "auto":
        shape = next((name for name, column in FORMATS.items() if column in given), "")
    needed = FORMATS.get(shape)
    if needed not in given:
        every = "prompt, or context and question, or messages, or instruction and input"
        raise record.missing(
            f"{needed or every}, not empty",
            f"name the column that has it, columns: {{{needed or 'prompt'}: ...}}",
        )
    return Example(record, given, shape)


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
            is_empty = not value.strip() if isinstance(value, str) else value in (None, [])
            if not is_empty:
                given.setdefault(name, one)
    return given


def _answer(record: Record, column: str, value: object) -> str:
    """An answer as text; numbers are written out."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and (not isinstance(value, str) or not value.strip()):
        raise record.wrong(column, "an answer that is not empty, a text or a number", value)
    return str(value)


def _is_messages(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _has_text(message: Message) -> bool:
    return any(value for key, value in message.items() if key != "role")


def _messages(record: Record, column: str) -> tuple[Message, ...]:
    value: Any = record.fields[column]
    if isinstance(value, str):
        value = _parsed(value)
    if not _is_messages(value):
        expected = "a list of messages, [{role: ..., content: ...}]"
        raise record.wrong(column, expected, record.fields[column])
    messages = []
    for at, one in enumerate(value):
        place = f"{column}[{at}]"
        if not isinstance(one, Mapping):
            raise record.wrong(place, "a mapping of role and content", one)
        # parquet fills the keys that other messages have with nulls
        message = {key: item for key, item in one.items() if item is not None}
        if "from" in message and "role" not in message:
            message["role"] = message.pop("from")
            message.setdefault("content", message.pop("value", ""))
        if not isinstance(message.get("role"), str):
            raise record.wrong(place, "role and content, or from and value", one)
        message["role"] = _ROLES.get(message["role"], message["role"])
        message.setdefault("content", "")
        messages.append(message)
    return tuple(messages)


def _parsed(text: str) -> Any:
    """What JSON text holds (parquet files often keep messages and tools so), or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
