"""An answer's text in its parts, as it comes: thoughts, content, and calls of tools.

    <think> ... </think>          reasoning
    The weather is                content
    <tool_call>{...}</tool_call>  a call (Qwen's and Hermes's form)
    {"name": ..., "parameters": ...}   one, too, if the answer begins so (Llama's form)

What may still become a marker is held back until it is decided.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from swaa_jax.chats import CLOSING, OPENING, THOUGHT_MARKERS

__all__ = ["Call", "Part", "Sections"]

_CALL_OPENING, _CALL_CLOSING = "<tool_call>", "</tool_call>"
_OPENINGS, _CLOSINGS = zip(*THOUGHT_MARKERS, strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool.

    Attributes:
        id: for the message that answers it.
        name: the tool's.
        arguments: JSON of a mapping.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of one of the parts: a text, or a whole call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: Call | None = None


class Sections:
    """Cuts a growing text into its parts; the texts of all parts of a kind are that part whole.

    Args:
        opened: the text begins within a thought.
        calls: there are tools, so that calls are looked for.
        thoughts: thoughts are looked for.
    """

    def __init__(self, *, opened: bool, calls: bool, thoughts: bool = True):
        self._calls, self._thoughts = calls, thoughts
        self._state: Literal["start", "thought", "content", "call", "json"]
        self._state = "thought" if opened else "start"
        self._text = ""  # what is not given out yet
        self._skips = False  # blanks that follow a thought or a call
        self._num_tried = 0  # characters of a beginning that is no whole call

    def push(self, piece: str) -> list[Part]:
        """The parts that this piece completes."""
        self._text += piece
        return self._advance(is_last=False)

    def finish(self) -> list[Part]:
        """What was held back, now that nothing follows."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        step = {
            "start": self._at_start,
            "thought": self._in_thought,
            "content": self._in_content,
            "call": self._in_call,
            "json": self._in_json,
        }
        while self._skip_blanks() and step[self._state](parts, is_last):
            pass
        return parts

    def _skip_blanks(self) -> bool:
        if self._skips:
            self._text = self._text.lstrip()
            self._skips = not self._text
        return True

    # Each step takes what it can of the text, and says whether another step is to go on.

    def _at_start(self, parts: list[Part], is_last: bool) -> bool:
        """Before any content: blanks, which stay with what follows."""
        blank = len(self._text) - len(self._text.lstrip())
        rest = self._text[blank:]
        found = OPENING.match(rest) if self._thoughts else None
        if found:
            self._text, self._state = rest[found.end() :], "thought"
            return True
        may_open = self._thoughts and any(one.startswith(rest) for one in _OPENINGS)
        if not is_last and (not rest or may_open):
            return False
        self._state = "json" if self._calls and rest.startswith("{") else "content"
        return True

    def _in_thought(self, parts: list[Part], is_last: bool) -> bool:
        found = CLOSING.search(self._text)
        if found:
            self._give(parts, "reasoning", self._text[: found.start()])
            self._text, self._state = self._text[found.end() :], "start"
            self._thoughts, self._skips = False, True  # an answer thinks once
            return True
        held = 0 if is_last else _may_begin(self._text, _CLOSINGS)
        self._give(parts, "reasoning", self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _in_content(self, parts: list[Part], is_last: bool) -> bool:
        start = self._text.find(_CALL_OPENING) if self._calls else -1
        if start >= 0:
            # Blanks before a call are the template's.
            self._give(parts, "content", self._text[:start].rstrip())
            self._text, self._state = self._text[start + len(_CALL_OPENING) :], "call"
            return True
        held = 0
        if self._calls and not is_last:
            held = _may_begin(self._text, (_CALL_OPENING,))
            before = self._text[: len(self._text) - held]
            held += len(before) - len(before.rstrip())
        self._give(parts, "content", self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _in_call(self, parts: list[Part], is_last: bool) -> bool:
        end = self._text.find(_CALL_CLOSING)
        if end < 0 and not is_last:
            return False
        inside, behind = self._text, ""
        if end >= 0:
            inside, behind = self._text[:end], self._text[end + len(_CALL_CLOSING) :]
        call = _read_call(inside)
        self._text, self._state, self._skips = behind, "content", call is not None
        if call is None:  # no call after all: what it said is not lost
            raw = _CALL_OPENING + inside + (_CALL_CLOSING if end >= 0 else "")
            self._give(parts, "content", raw)
        else:
            parts.append(Part(kind="call", call=call))
        return bool(self._text)

    def _in_json(self, parts: list[Part], is_last: bool) -> bool:
        """Calls in Llama's form: JSON from the answer's beginning, one after the other."""
        tried, self._num_tried = self._num_tried, len(self._text)
        if tried and not is_last and "}" not in self._text[tried:]:
            return False
        text = self._text.lstrip().removeprefix(";").lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            value, end = None, 0
        call = _call_of(value)
        if call is not None:
            parts.append(Part(kind="call", call=call))
            self._text, self._num_tried = text[end:], 0
            return bool(self._text.strip())
        if end or is_last or (text and not text.startswith("{")):
            self._state = "content"
            return bool(self._text)
        return False

    def _give(self, parts: list[Part], kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            parts.append(Part(kind=kind, text=text))


def _may_begin(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of a text that may be the beginning of a marker.

    >>> _may_begin("so </th", ("</think>",))
    4
    """
    sizes = range(max(map(len, markers)) - 1, 0, -1)
    ends = (size for size in sizes if size <= len(text))
    return next((n for n in ends if any(m.startswith(text[-n:]) for m in markers if len(m) > n)), 0)


def _read_call(inside: str) -> Call | None:
    try:
        return _call_of(json.loads(inside))
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any) -> Call | None:
    """A call from what a model wrote; None: it is none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, Mapping):
        return None
    try:  # a model may write NaN, or half of a character, which no answer can hold
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (value["name"] + written).encode()
    except (ValueError, RecursionError):
        return None
    return Call(id=f"call_{secrets.token_hex(12)}", name=value["name"], arguments=written)
