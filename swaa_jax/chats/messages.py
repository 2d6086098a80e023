"""One form for the messages of a chat, whatever they looked like before.

    role            in lower case; human, gpt, model, ... become user and assistant
    content         text: parts of text are joined, a tool's result is a `Result`, JSON
    tool_calls      [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
    reasoning_content   what the assistant thought, from `reasoning` or `thinking` too

ShareGPT's `from` and `value`, with `function_call` and `observation`, and OpenAI's older
`function_call` take the same form. What has no such form is refused, never dropped.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from swaa_jax.documents import parse_json, problem_within
from swaa_jax.fields import describe, nearest, show
from swaa_jax.limits import MAX_MESSAGES

__all__ = ["ChatError", "Message", "Result", "Tools", "normal_messages", "normal_tools"]

Message: TypeAlias = Mapping[str, Any]
"""A turn of a chat in the one form that templates are given.

>>> normal_messages([{"from": "human", "value": "2 + 2?"}])[0]
{'role': 'user', 'content': '2 + 2?'}
"""

Tools: TypeAlias = tuple[object, ...] | None
"""Descriptions of tools as plain data; None: there are none.

>>> normal_tools([]) is None
True
"""

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
"""Roles of an assistant's message whose content is the JSON of a call."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_OF_FUNCTIONS = ("name", "arguments", "parameters")
_OF_CALLS = ("type", "id", "index", "function")


class Result(str):
    """A tool's result that was no text, as JSON.

    Attributes:
        value: what it was, for templates that write JSON themselves.
    """

    value: Any


class ChatError(ValueError):
    """A chat that cannot be rendered, or would lose something. The message begins with the part
    of the chat that is wrong; the file or prompt is the caller's to name.

    >>> normal_messages([{"role": "usr", "content": "2 + 2?"}])
    Traceback (most recent call last):
        ...
    swaa_jax.chats.messages.ChatError: message 0, role: expected ... (did you mean 'user'?)
    """


def normal_messages(messages: object, name: str = "message {}") -> tuple[Message, ...]:
    """Messages in their one form; those that have it stay as they are.

    Args:
        messages: a list of mappings.
        name: of each, for what is said of it; its number stands for the braces.

    Raises:
        ChatError: something that is no message, or holds what has no form here.

    Examples:
        >>> normal_messages([{"from": "human", "value": "Hi"}])
        ({'role': 'user', 'content': 'Hi'},)
        >>> normal_messages([{"role": "User", "content": [{"type": "text", "text": "Hi"}]}])
        ({'role': 'user', 'content': 'Hi'},)
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong("messages", "a list of them, [{role: ..., content: ...}]", messages)
    if len(messages) > MAX_MESSAGES:
        raise ChatError(f"messages: expected at most {MAX_MESSAGES}, got {len(messages)}; split it")
    return tuple(_normal(one, name.format(at)) for at, one in enumerate(messages))


def normal_tools(tools: object, name: str = "tools") -> Tools:
    """Descriptions of tools as plain data, from a list of them or its JSON; None where none are.

    Python functions are described by their annotations and docstrings, as Transformers does it.

    Raises:
        ChatError: anything else.

    Examples:
        >>> def add(a: int, b: int) -> int:
        ...     '''Adds.
        ...
        ...     Args:
        ...         a: one number.
        ...         b: the other.
        ...     '''
        >>> normal_tools([add])[0]["function"]["parameters"]["required"]
        ['a', 'b']
    """
    if isinstance(tools, str):
        tools = _json(tools, name, "a list, or its JSON")
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise _wrong(name, "a list, or its JSON", tools)
    return tuple(_tool(one, f"{name}[{at}]") for at, one in enumerate(tools)) or None


def _tool(tool: Any, name: str) -> object:
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            return get_json_schema(tool)
        except Exception as error:  # its own kinds for docstrings and types
            reason = " ".join(str(error).split())[:200]
            raise ChatError(
                f"{name}: expected a function with type hints and a docstring, got {show(tool)} "
                f"({reason})"
            ) from error
    if isinstance(tool, str):
        tool = _json(tool, name, "a mapping, or its JSON")
    if not isinstance(tool, Mapping):
        raise _wrong(name, "a mapping that describes a tool", tool)
    if problem := problem_within(tool):
        raise ChatError(f"{name}: {problem}")
    return tool


def _normal(one: object, name: str) -> Message:
    if not isinstance(one, Mapping):
        raise _wrong(name, 'a mapping of role and content, {"role": ..., "content": ...}', one)
    message = {str(key): value for key, value in one.items() if value is not None}
    for names in (("content", "value"), ("tool_calls", "function_call"), _THOUGHTS):
        said = [key for key in names if message.get(key) not in (None, "", [])]
        if any(message[key] != message[said[0]] for key in said):
            raise _wrong(name, f"one of {' and '.join(said)}", one)
    if "from" in message and "role" not in message:
        said = {"content": message.pop("value")} if "value" in message else {}
        message = {"role": message.pop("from"), **said, **message}
    if problem := problem_within(message):
        raise ChatError(f"{name}: {problem}")
    role = message.get("role")
    if not isinstance(role, str):
        raise _wrong(name, "role and content, or from and value", one)
    told = role.strip().lower()
    calls = message.pop("tool_calls", None)
    if told in _CALLS:
        called = _json(message.get("content"), f"{name}, content", "the JSON of a call")
        calls, told, message["content"] = called, "assistant", ""
    elif "function_call" in message:
        calls = message.pop("function_call")
    if told not in _ROLES and (near := nearest(told, _ROLES, cutoff=0.75)):
        raise ChatError(
            f"{name}, role: expected one of {', '.join(_ROLES)}, or a role of the template's own, "
            f"got {show(role)}{near}"
        )
    message["role"] = _ROLES.get(told, role)
    is_said = "content" in message
    content = message.get("content", "")
    message["content"] = _text(content, f"{name}, content", is_result=message["role"] == "tool")
    thoughts = [message.pop(key) for key in _THOUGHTS if key in message]
    if thoughts:
        message["reasoning_content"] = _text(thoughts[0], f"{name}, reasoning_content")
    if calls := _calls(calls, f"{name}, tool_calls"):
        message["tool_calls"] = calls
    if not (is_said or thoughts or calls):
        raise _wrong(name, "content, tool_calls or reasoning_content", one)
    return message


def _text(content: Any, name: str, *, is_result: bool = False) -> str:
    """Text, or parts of text joined; of a tool's result anything else, as JSON."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [_part(part) for part in parts]
    if isinstance(content, list | tuple | Mapping) and all(text is not None for text in texts):
        return "".join(text for text in texts if text is not None)
    if is_result:
        result = Result(_to_json(content, name))
        result.value = content
        return result
    wrong = next(part for part, text in zip(parts, texts, strict=True) if text is None)
    raise _wrong(name, 'text, or parts of text, {"type": "text", "text": ...}', wrong)


def _part(part: Any) -> str | None:
    """The text of a part; None where it is something else."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") not in _TEXT_PARTS:
        return None
    rest = {key for key, value in part.items() if value is not None} - {"type", "text"}
    text = part.get("text")
    return text if isinstance(text, str) and not rest - {"cache_control", "annotations"} else None


def _calls(calls: Any, name: str) -> list[Message]:
    if isinstance(calls, str):
        calls = _json(calls, name, "a list of calls, or its JSON")
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list | tuple | None):
        raise _wrong(name, "a list of calls", calls)
    return [_call(call, f"{name}[{at}]") for at, call in enumerate(calls or ())]


def _call(call: Any, name: str) -> Message:
    """A call in OpenAI's form, with the arguments parsed once: templates write them as JSON.

    Llama's own name for the arguments, `parameters`, is taken too.
    """
    expected = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
    if not isinstance(call, Mapping):
        raise _wrong(name, expected, call)
    known = {key: value for key, value in call.items() if value is not None}
    function = known.get("function")
    if function is None:
        function = {key: known.pop(key) for key in _OF_FUNCTIONS if key in known}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _wrong(name, expected, call)
    function = {key: value for key, value in function.items() if value is not None}
    more = [*(known.keys() - {*_OF_CALLS}), *(function.keys() - {*_OF_FUNCTIONS})]
    if more or {"arguments", "parameters"} <= function.keys():
        expected = f"a call of {', '.join(_OF_CALLS)}, and a function of name and arguments"
        raise _wrong(name, expected, call)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}, arguments", "a JSON object") if arguments else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise _wrong(f"{name}, arguments", "a mapping, or its JSON", arguments)
    arguments = {} if arguments is None else arguments
    called = {"name": function["name"], "arguments": arguments}
    return {"type": "function", **known, "function": called}


def _json(text: object, name: str, expected: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ChatError(f"{name}: expected {expected}, got {describe(text)}; {error}") from error


def _to_json(value: object, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise _wrong(name, "text, or what JSON can hold", value) from error


def _wrong(name: str, expected: str, got: Any) -> ChatError:
    return ChatError(f"{name}: expected {expected}, got {describe(got)}")
