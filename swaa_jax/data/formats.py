"""Rows of any of the known shapes, as conversations or as texts to be completed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_jax.data.config import DataConfig
from swaa_jax.data.rows import DataError, Row

__all__ = ["Completion", "Conversation", "parse_row"]

Message = Mapping[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_USUAL = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "response": ("response", "completion"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "tools": ("tools",),
}
_NEEDED = {
    "chat": ("messages",),
    "prompt": ("prompt", "response"),
    "instruction": ("instruction", "output"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, the last one the assistant's, and the tools that the template is told of."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A text and how it goes on; no template."""

    prompt: str
    response: str


def parse_row(row: Row, config: DataConfig) -> Conversation | Completion:
    """What a row says.

    ========================================  ==================================================
    format       columns                      becomes
    ========================================  ==================================================
    chat         messages | conversations     its messages: role/content or from/value
    prompt       prompt, response             a user's and the assistant's message; a prompt may be
                                              a list of messages
    instruction  instruction, input?, output  the same, input after a blank line
    ========================================  ==================================================

    Raises:
        DataError: columns of no known shape, a row without an answer, or a message without role.
    """
    columns = _columns(row, config)
    kind = config.format if config.format != "auto" else _detect(row, columns)
    absent = [name for name in _NEEDED[kind] if name not in columns]
    if absent:
        raise DataError(
            f"{row.place}: expected {_list(_NEEDED[kind])} in a row of the format {kind!r}, found "
            f"no {_list(absent)} among its columns {_list(row.fields)}. Name the column that has "
            f"it, columns: {{{absent[0]}: ...}}, or another format."
        )
    values = {name: row.fields[column] for name, column in columns.items()}
    tools = _tools(row, values.get("tools"))
    if kind == "chat":
        if not config.chat_template:
            raise DataError(
                f"{row.place}: chat_template: false is for texts, but this row has messages. Leave "
                "it out, or give files with a prompt and a response."
            )
        return _conversation(row, _messages(row, values["messages"]), tools)
    if kind == "instruction":
        prompt, response = values["instruction"], values["output"]
        if values.get("input"):
            prompt = f"{prompt}\n\n{values['input']}"
    else:
        prompt, response = values["prompt"], values["response"]
    if _is_messages(prompt):
        if not _is_messages(response):
            response = [{"role": "assistant", "content": response or ""}]
        return _conversation(row, (*_messages(row, prompt), *_messages(row, response)), tools)
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str) or not value.strip():
            raise _no_answer(row, f"a text as its {name}, got {str(value)[:40]!r}")
    if not config.chat_template:
        return Completion(prompt=prompt, response=response)
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return _conversation(row, messages, tools)


def _columns(row: Row, config: DataConfig) -> dict[str, str]:
    """Our name to the row's, of those that it has."""
    columns = {}
    for name, usual in _USUAL.items():
        named = config.columns.get(name)
        if named is not None and named not in row.fields:
            raise DataError(
                f"{row.place}: columns says that {name} is in {named!r}, but the row's columns are "
                f"{_list(row.fields)}. Correct it or leave it out."
            )
        for column in (named,) if named is not None else usual:
            if row.fields.get(column) is not None:
                columns.setdefault(name, column)
            elif column in row.fields and name in ("response", "output"):
                columns.setdefault(name, column)  # there and null: a row without an answer
    return columns


def _detect(row: Row, columns: Mapping[str, str]) -> str:
    for kind, needed in _NEEDED.items():
        if needed[0] in columns:
            if needed[-1] not in columns:
                raise _no_answer(row, f"a column {needed[-1]!r} beside {columns[needed[0]]!r}")
            return kind
    raise DataError(
        f"{row.place}: expected messages (or conversations), prompt and response, or instruction "
        f"and output, found the columns {_list(row.fields)}. Say which columns hold them, "
        "columns: {prompt: ..., response: ...}."
    )


def _no_answer(row: Row, expected: str) -> DataError:
    return DataError(
        f"{row.place} has no answer to train on: expected {expected}; its columns are "
        f"{_list(row.fields)}. Remove the row, or name the column that holds the answer, "
        "columns: {response: ...}."
    )


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _messages(row: Row, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):  # parquet files often keep them as JSON text
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not _is_messages(value):
        raise DataError(
            f'{row.place}: expected a list of messages, [{{"role": ..., "content": ...}}], got '
            f"{str(value)[:60]!r}. Mend the row, or name another column, columns: {{messages: ...}}"
        )
    messages = []
    for position, message in enumerate(value):
        # parquet fills the keys that other messages have with nulls
        message = {key: item for key, item in dict(message).items() if item is not None}
        if "from" in message and "role" not in message:
            message["role"] = message.pop("from")
            message.setdefault("content", message.pop("value", ""))
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{row.place}, message {position}: expected role and content (or from and value), "
                f"found {_list(message)}. Mend the row."
            )
        message["role"] = _ROLES.get(message["role"], message["role"])
        message.setdefault("content", "")
        messages.append(message)
    return tuple(messages)


def _conversation(
    row: Row, messages: Sequence[Message], tools: tuple[Any, ...] | None
) -> Conversation:
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise _no_answer(row, f"a message of the assistant among its messages ({roles})")
    last = messages[answers[-1]]
    if not any(value for key, value in last.items() if key != "role"):
        raise _no_answer(row, "some text in the assistant's last message, got an empty one")
    return Conversation(messages=tuple(messages[: answers[-1] + 1]), tools=tools)


def _tools(row: Row, value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{row.place}: expected tools as a list or its JSON, got what is not JSON ({error})"
            ) from error
    return tuple(value) if value else None


def _list(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
