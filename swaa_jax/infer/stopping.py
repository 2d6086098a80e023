"""When a row ends, and with which text: EOS, stop ids, stop strings, partial characters."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["eos", "stop", "length"]

_REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are no character, or not one yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopRules:
    """What ends an answer, besides its length.

    Args:
        eos_ids: the model's own end tokens; the finish reason is "eos".
        stop_ids: further tokens that end it; the finish reason is "stop".
        strings: texts that end it; the answer is cut before them.
    """

    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every token that ends a row, sorted."""
        return tuple(sorted(self.eos_ids | self.stop_ids))


def make_stop_rules(
    tok: "PreTrainedTokenizerBase | None",
    *,
    eos_ids: Iterable[int] = (),
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> StopRules:
    """Rules from the caller's arguments.

    A stop string that is one of the tokenizer's special tokens becomes a stop id: decoded text
    leaves special tokens out, so as a string it would never be met.

    Raises:
        ValueError: an empty stop string, or a stop string without a tokenizer.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not text for text in strings):
        raise ValueError("stop: expected texts of at least one character, got an empty string")
    if strings and tok is None:
        raise ValueError("stop: expected a tokenizer for texts, got None; use stop_token_ids")
    special = [] if tok is None else [text for text in strings if text in tok.all_special_tokens]
    special_ids = [] if tok is None else tok.convert_tokens_to_ids(special)
    return StopRules(
        eos_ids=frozenset(int(token) for token in eos_ids),
        stop_ids=frozenset([*map(int, stop_token_ids), *cast(list[int], special_ids)]),
        strings=tuple(text for text in strings if text not in special),
    )


def decode_text(tok: "PreTrainedTokenizerBase | None", ids: Sequence[int]) -> str:
    """Text of token ids without special tokens; empty without a tokenizer."""
    if tok is None or not ids:
        return ""
    text = tok.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast(str, text)  # one list of ids, one text


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    A token may hold part of a character, or a space that only shows beside its neighbours. So each
    new token is decoded together with the ones since the last clean break, and trailing
    replacement characters wait for the bytes that complete them.

        ids      ... | a  b | c  d
        prefix       ^             decoded again each time, for context
        read                ^      where the last clean break was
    """

    def __init__(self, tok: "PreTrainedTokenizerBase | None"):
        self._tok = tok
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._shown = 0  # characters of decode(ids[prefix:]) that were given out already

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete, possibly empty."""
        self._ids.extend(ids)
        text = decode_text(self._tok, self._ids[self._prefix :])
        stable = text.rstrip(_REPLACEMENT)
        piece = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(text):
            self._prefix, self._read = self._read, len(self._ids)
            self._shown = len(decode_text(self._tok, self._ids[self._prefix :]))
        return piece

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        text = decode_text(self._tok, self._ids[self._prefix :])
        piece = text[self._shown :]
        self._shown = len(text)
        return piece


class AnswerRow:
    """One row's new tokens, when it ends, and its text so far.

    Args:
        tok: the tokenizer, or None where only tokens matter.
        rules: what ends the row.
        max_new_tokens: its longest answer.
        streaming: keep the text up to date, for `take_text`. Stop strings need it anyway.
    """

    def __init__(
        self,
        tok: "PreTrainedTokenizerBase | None",
        rules: StopRules,
        *,
        max_new_tokens: int,
        streaming: bool = False,
    ):
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tok = tok
        self._rules = rules
        self._max_new_tokens = max_new_tokens
        self._detokenizer = Detokenizer(tok) if streaming or rules.strings else None
        self._text = ""
        self._cut: int | None = None  # where a stop string begins
        self._taken = 0

    @property
    def is_done(self) -> bool:
        """Whether the row has ended."""
        return self.finish_reason is not None

    def push(self, ids: Iterable[int]) -> None:
        """Add new tokens, up to the one that ends the row; the rest is dropped."""
        for token in ids:
            if self.is_done:
                return
            self.tokens.append(int(token))
            if token in self._rules.eos_ids:
                self._finish("eos")
            elif token in self._rules.stop_ids:
                self._finish("stop")
            else:
                if self._detokenizer is not None:
                    self._extend(self._detokenizer.push([int(token)]))
                if self._cut is not None:
                    self._finish("stop")
                elif len(self.tokens) >= self._max_new_tokens:
                    self._finish("length")

    @property
    def text(self) -> str:
        """The answer: no special tokens, no token that ended it, cut before a stop string."""
        if self._cut is not None:
            return self._text[: self._cut]
        ended_by_token = self.finish_reason in ("eos", "stop")
        return decode_text(self._tok, self.tokens[:-1] if ended_by_token else self.tokens)

    def take_text(self) -> str:
        """Text since the last call that no later token can take back (streaming only)."""
        if self._cut is not None:
            end = self._cut
        elif self.is_done:
            end = len(self._text)
        else:
            end = len(self._text) - _held_back(self._text, self._rules.strings)
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._detokenizer is not None and self._cut is None:
            self._extend(self._detokenizer.finish())
            if self._cut is not None:
                self.finish_reason = "stop"

    def _extend(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        starts = [
            self._text.find(text, max(0, before - len(text) + 1)) for text in self._rules.strings
        ]
        found = [start for start in starts if start >= 0]
        if found:
            self._cut = min(found)


def _held_back(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a stop string.

    >>> _held_back("the en", ["end", "stop"])
    2
    """
    return max(
        (
            size
            for stop in strings
            for size in range(1, min(len(stop) - 1, len(text)) + 1)
            if text.endswith(stop[:size])
        ),
        default=0,
    )
