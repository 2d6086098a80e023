"""A chat as text, by the tokenizer's template: once, or not at all where something would be lost.

Templates leave out what they do not know: a role, a tool, a thought. So each chat is rendered a
second time with a mark in every message, and a mark that does not come out again is an error:

    {"role": "user", "content": "Hi"}             user: Hi|0
    {"role": "observation", "content": "20 C"}    (nothing)         message 1 is lost
    {"role": "assistant", "content": "Warm"}      assistant: Warm|2
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.chats.messages import ChatError, Message, Result, Tools, normal_messages, normal_tools
from swaa_jax.chats.process import render_apart
from swaa_jax.chats.thoughts import CLOSING, OPENING
from swaa_jax.documents import problem_within
from swaa_jax.fields import describe, nearest, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FLAGS",
    "TEMPLATE_DATE",
    "Rendered",
    "render_chat",
    "unused_variables",
    "warn_of_unread",
]

log = logging.getLogger(__name__)

TEMPLATE_DATE = "2024-07-26"
"""What templates are told that today is, unless the variable `strftime_now` says otherwise. It is
Llama 3.2's own for want of a clock: one day, so that the same chat is the same tokens tomorrow.

>>> datetime.date.fromisoformat(TEMPLATE_DATE).year
2024
"""

_CONTINUED = "CONTINUED_HERE "
_WARNING = threading.Lock()
FLAGS = ("train", "weight")
"""Keys of a message that are for training, not for the template.

>>> {"role": "assistant", "content": "4", "weight": 0.5}.keys() & set(FLAGS)  # not rendered
{'weight'}
"""
_KEYS = {"role", "content", "tool_calls", "reasoning_content", "thinking", *FLAGS}
_KEYS |= {"id", "type", "tool_call_id"}  # that templates may leave out


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A chat's text.

    Attributes:
        text: with all that the template adds.
        generated: the spans that it marks as the model's, with ``{% generation %}``.
        unread: keys of messages that it does not name, so that they have no effect.

    Examples:
        >>> Rendered("<user>2 + 2?<end>", ()).unread
        ()
    """

    text: str
    generated: tuple[tuple[int, int], ...]
    unread: tuple[str, ...] = ()


def render_chat(
    tok: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    generation_prompt: bool = True,
    continued: bool = False,
) -> Rendered:
    r"""A chat by the tokenizer's template, as Transformers' `apply_chat_template`, but in a process
    apart and with a pinned date.

    Args:
        tok: a tokenizer with a chat template.
        messages: in any form that `normal_messages` takes.
        tools: descriptions, or Python functions.
        variables: further ones of the template; `strftime_now`, a date in ISO's form, is what its
            function of that name tells.
        generation_prompt: end with the cue for the assistant's turn.
        continued: end within the last message, which is to be continued, without a cue.

    Raises:
        ChatError: messages that have no form, a template that fails or takes too long, or one
            that leaves out a message's text, tool calls or thoughts, or the tools.

    Examples:
        >>> from swaa_jax.checkpoint import load_tokenizer
        >>> chat = [{"role": "user", "content": "2 + 2?"}]
        >>> tok, variables = load_tokenizer("tiny-retriever"), {"enable_thinking": False}
        >>> render_chat(tok, chat, variables=variables).text
        '<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'
    """
    messages = normal_messages(messages)
    described = normal_tools(tools)
    given = dict(variables or {})
    date = _date(given.pop("strftime_now", TEMPLATE_DATE))
    template = _Template(_template(tok, described), _json(_known(tok) | given), date)
    unread = template.unread(messages)
    warn_of_unread(unread)
    messages = template.prepared(messages)
    if continued:
        last = {**messages[-1], "content": messages[-1]["content"] + _CONTINUED}
        messages = (*messages[:-1], last)
    answered = messages[-1]["role"] == "assistant" and not (generation_prompt or continued)
    marks = _Marks(messages, described, answered=answered)
    plain, marked = template.render(
        (messages, described, generation_prompt and not continued),
        (marks.messages, marks.tools, generation_prompt and not continued),
    )
    if "error" in plain:
        raise ChatError(
            f"expected messages that the chat template takes, got an error ({plain['error']})"
        )
    last = len(messages) - 1
    for mark in marks.lost(marked.get("text"), plain["text"]):
        thinker = last if mark.thinks is None else mark.thinks
        if thinker == last or not template.knows_thought(messages[thinker]):
            raise ChatError(
                f"{mark.name}: expected a chat template that renders {mark.what}, "
                f"{show(mark.text)}, got one that leaves it out; write it in a form that the "
                "template knows, or remove it"
            )
    if not continued:
        return Rendered(plain["text"], tuple((a, b) for a, b in plain["spans"]), unread)
    return Rendered(_cut(plain["text"], len(messages) - 1), (), unread)


def unused_variables(
    tok: "PreTrainedTokenizerBase | None", variables: Mapping[str, Any]
) -> list[str]:
    """Those that the tokenizer's template does not name, so that they have no effect.

    >>> from swaa_jax.checkpoint import load_tokenizer
    >>> tok = load_tokenizer("tiny-retriever")
    >>> unused_variables(tok, {"enable_thinking": False, "enable_thoughts": False})
    ['enable_thoughts']
    """
    template = str(getattr(tok, "chat_template", None) or "")
    return [
        name
        for name in variables
        if template and not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template)
    ]


class _Template:
    """A template with its variables and its date."""

    def __init__(self, source: str, variables: Mapping[str, Any], date: str):
        self._source, self._variables, self._date = source, variables, date
        self._with_results = False  # results that are no text are given as they are

    def render(self, *chats: tuple[Sequence[Message], Any, bool]) -> list[dict[str, Any]]:
        return render_apart(
            self._source,
            [
                {
                    "messages": [self._given(message) for message in messages],
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": generation_prompt,
                    **{
                        key: self._variables[key]
                        for key in ("documents",)
                        if key in self._variables
                    },
                }
                for messages, tools, generation_prompt in chats
            ],
            variables={"documents": None, **self._variables},
            date=self._date,
        )

    def unread(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Keys of messages that the template does not name."""
        keys = dict.fromkeys(key for message in messages for key in message)
        return tuple(key for key in keys if key not in _KEYS and not _reads_key(self._source, key))

    def prepared(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages with what depends on the template: its name of a role, its form of calls."""
        prepared = messages
        if "developer" not in self._source:
            prepared = [
                {**one, "role": "system"} if one["role"] == "developer" else one for one in prepared
            ]
        if any("tool_calls" in one for one in prepared) and _joins_arguments(self._source):
            prepared = [_with_arguments(one, _as_json) for one in prepared]
        if any(isinstance(one["content"], Result) for one in prepared):
            self._with_results = _writes_results(self._source)
        return tuple(prepared)

    def _given(self, message: Message) -> Message:
        """As Transformers gives it: `thinking` too, for templates that read a thought there."""
        given = {key: value for key, value in message.items() if key not in FLAGS}
        content = message["content"]
        if self._with_results and isinstance(content, Result):
            given["content"] = content.value
        if "reasoning_content" in message:
            return {"thinking": message["reasoning_content"], **given}
        return given

    def knows_thought(self, message: Message) -> bool:
        """Whether a thought is rendered while its message is the last one."""
        marks = _Marks(({"role": "user", "content": "Q"}, message), None, answered=True)
        (found,) = self.render((marks.messages, None, False))
        return "text" in found and all(one.thinks is None for one in marks.lost(found["text"]))


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A mark, and what it stands in: its name, what it is, its text; of a thought its message."""

    mark: str
    name: str
    what: str
    text: str
    thinks: int | None


class _Marks:
    """A copy of a chat, `messages` and `tools`, with a mark in all that must be rendered."""

    def __init__(self, messages: Sequence[Message], tools: Tools, *, answered: bool):
        self._marks: list[_Mark] = []
        self._stem = _unused(messages, tools)
        last = len(messages) - 1
        self.messages = tuple(
            self._marked(at, message, answered=answered and at == last)
            for at, message in enumerate(messages)
        )
        self.tools = tools and [
            self._named(f"tools[{at}]", "a tool", tool) for at, tool in enumerate(tools)
        ]

    def lost(self, marked: str | None, plain: str = "") -> Iterator[_Mark]:
        """What is missing in the rendering of the copy.

        Where the template does not take the copy (`marked` is None), the texts themselves are
        looked for in the rendering of the chat.
        """
        found = set(re.findall(rf"{self._stem}\d+Z", marked or ""))
        for one in self._marks:
            if one.mark not in found if marked is not None else one.text not in plain:
                yield one

    def _mark(self, name: str, what: str, text: str, thinks: int | None = None) -> str:
        mark = f"{self._stem}{len(self._marks)}Z"
        self._marks.append(_Mark(mark, name, what, text.strip(), thinks))
        return mark

    def _after(self, name: str, what: str, text: str, thinks: int | None = None) -> str:
        """The text with a mark at its end, before the blanks there, which templates may trim."""
        bare = text.rstrip()
        return f"{bare}{self._mark(name, what, bare, thinks)}{text[len(bare) :]}" if bare else text

    def _marked(self, at: int, message: Message, *, answered: bool) -> Message:
        name, content = f"message {at}", message["content"]
        marked = dict(message)
        closing = CLOSING.search(content)
        if answered and closing and OPENING.sub("", content[: closing.start()]).strip():
            thought, rest = content[: closing.start()], content[closing.end() :]
            thought = self._after(name, "the answer's thought", thought, at)
            marked["content"] = thought + closing[0] + self._after(name, "its text", rest)
        else:
            marked["content"] = self._after(name, "its text", content)
        if "reasoning_content" in message:
            marked["reasoning_content"] = self._after(
                f"{name}, reasoning_content", "its thought", message["reasoning_content"], at
            )
        if "tool_calls" in message:
            marked["tool_calls"] = [
                self._named(f"{name}, tool_calls[{n}]", "the call", call)
                for n, call in enumerate(message["tool_calls"])
            ]
        return marked

    def _named(self, name: str, what: str, tool: Any) -> Any:
        """A tool or a call with a mark in the function's name, if it has one, and in arguments."""
        inner = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(inner, Mapping):
            return {**tool, "function": self._named(name, what, inner)}
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
            return tool
        named = {**tool, "name": tool["name"] + self._mark(name, what, tool["name"])}
        told = tool.get("arguments")
        if isinstance(told, str) and told:
            named["arguments"] = told + self._mark(name, "the call's arguments", told)
        elif isinstance(told, Mapping):
            named["arguments"] = {
                key + self._mark(f"{name}, {key}", "the call's argument", key): value
                for key, value in told.items()
            }
        return named


def _unused(messages: Sequence[Message], tools: Tools) -> str:
    """Letters that are nowhere in a chat."""
    try:
        text = json.dumps([messages, tools], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ChatError(
            f"expected messages and tools of JSON's types, got others ({reason})"
        ) from error
    return f"Mark{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}X"


def _cut(text: str, last: int) -> str:
    """The rendering up to the end of the message that is to be continued."""
    at = text.rfind(_CONTINUED.strip())
    if at < 0:
        raise ChatError(
            f"message {last}: expected a chat template that renders the text to be continued, got "
            "one that leaves it out; end with the user's message"
        )
    trimmed = not text.startswith(_CONTINUED, at)
    return text[:at].rstrip() if trimmed else text[:at]


def _template(tok: "PreTrainedTokenizerBase", tools: Tools) -> str:
    try:
        return tok.get_chat_template(tools=None if tools is None else [*tools])  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ChatError(f"chat template: {' '.join(str(error).split())[:300]}") from error


def _known(tok: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The special tokens, which templates name."""
    return {
        name: [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
        for name, value in tok.special_tokens_map.items()
    }


def _json(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in variables.items():
        if problem := problem_within((name, value)):
            raise ChatError(f"chat_template_kwargs: {problem}")
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatError(
                f"chat_template_kwargs.{name}: expected what JSON can hold, got {describe(value)}"
            ) from error
    return variables


def _date(value: object) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    try:
        return datetime.datetime.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ChatError(
            f"chat_template_kwargs.strftime_now: expected a date such as {TEMPLATE_DATE}, got "
            f"{describe(value)}"
        ) from error


def _with_arguments(message: Message, form: Callable[[Any], Any]) -> Message:
    """A message whose calls have their arguments in another form."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": form(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def warn_of_unread(keys: Iterable[str]) -> None:
    """Says, once for each, which keys of messages have no effect.

    >>> warn_of_unread(["seen_on"])  # logged, once a process
    """
    with _WARNING:  # threads render a file's records
        for key in keys:
            _warn_of_key(key)


@functools.lru_cache(maxsize=256)
def _warn_of_key(key: str) -> None:
    hint = nearest(key, (*_KEYS, "name"), cutoff=0.75)
    log.warning("messages: the chat template knows no %s%s: it has no effect", show(key), hint)


@functools.lru_cache(maxsize=256)
def _reads_key(source: str, key: str) -> bool:
    """Whether a template names a message's key: `message.key` or `'key'`; not `<key>`, say."""
    name = re.escape(key)
    return re.search(rf"""\.\s*{name}(?!\w)|(['"]){name}\1""", source) is not None


@functools.lru_cache(maxsize=16)
def _joins_arguments(source: str) -> bool:
    """Whether a template joins arguments to its text as they are (DeepSeek's), so that they must be
    JSON already; others write them as JSON themselves.
    """
    plain, joined = (_probed(source, call) for call in _probe_calls())
    return _PROBE_JSON in joined and _PROBE_JSON not in plain


@functools.lru_cache(maxsize=16)
def _writes_results(source: str) -> bool:
    """Whether a template writes a tool's result as JSON, also one that is text (Llama 3.1's)."""
    call = _probe_calls()[_joins_arguments(source)]
    answer = {"role": "tool", "name": _PROBE_NAME, "tool_call_id": _PROBE_ID}
    name = f"{_PROBE_NAME}_result"
    given, text = (
        _probed(source, call, {**answer, "content": result})
        for result in ({name: 1}, _as_json({name: 1}))
    )
    return _as_json({name: 1}) in given and _as_json({name: 1}) not in text


_PROBE_NAME, _PROBE_ID = "probe_call", "abcdefghi"
_PROBE_ARGUMENTS = {"probe_key": "probe"}
_PROBE_JSON = _as_json(_PROBE_ARGUMENTS)


def _probe_calls() -> tuple[Message, Message]:
    """A message that calls, its arguments as a mapping and as JSON."""
    function = {"name": _PROBE_NAME, "arguments": _PROBE_ARGUMENTS}
    call = {"type": "function", "id": _PROBE_ID, "function": function}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return message, _with_arguments(message, _as_json)


def _probed(source: str, *messages: Message) -> str:
    """What a template makes of a question and these messages; nothing where it fails."""
    template = _Template(source, {"bos_token": "", "eos_token": ""}, TEMPLATE_DATE)
    (found,) = template.render((({"role": "user", "content": "Q"}, *messages), None, False))
    return found.get("text", "")
