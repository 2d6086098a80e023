"""When a row ends, and with which text: EOS, stop ids, stop strings, partial characters."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, cast

from swaa_jax.chats import CLOSING, LONGEST_MARKER, OPENING
from swaa_jax.checkpoint.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["eos", "stop", "length"]

_REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are no character, or not one yet
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_WINDOW, _KEPT = 64, 16  # tokens; bytes of one character are at most 4


class TokenText:
    """From token ids to text, without special tokens; no text at all without a tokenizer.

    Special are all tokens that the tokenizer's files call so, besides those that have a name
    (`eos_token`, ...): Transformers' own lists hold the named ones alone. Markers of thoughts are
    not, so that a reader finds the answer behind them.

    Attributes:
        special: text of each special token, by id.
    """

    def __init__(self, tok: "PreTrainedTokenizerBase | None"):
        self.special: dict[int, str] = {} if tok is None else special_tokens(tok)
        self._tok = tok
        self._is_byte: dict[int, bool] = {}

    def decode(self, ids: Iterable[int], *, with_special: bool = False) -> str:
        """The text of all of them."""
        kept = [token for token in ids if with_special or token not in self.special]
        if self._tok is None or not kept:
            return ""
        # What is special is left out above; the tokenizer's own idea of it has thoughts' markers.
        text = self._tok.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)  # one list of ids, one text

    def is_byte(self, token: int) -> bool:
        """Whether a token is a byte, as SentencePiece writes what is in no piece: `<0xE6>`."""
        if token not in self._is_byte:
            name = None if self._tok is None else self._tok.convert_ids_to_tokens(token)
            is_byte = isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None
            self._is_byte[token] = is_byte
        return self._is_byte[token]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopRules:
    """What ends an answer, besides its length.

    Args:
        eos_ids: the model's own end tokens; the finish reason is "eos".
        stop_ids: further tokens that end it; the finish reason is "stop".
        strings: texts that end it; the answer is cut before them.
        composites: the same, with special tokens in them: they are sought in the text that has the
            special tokens too.
        stop_in_thought: strings also count within thoughts (`swaa_jax.chats.thoughts`).
    """

    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    composites: tuple[str, ...] = ()
    stop_in_thought: bool = True

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every token that ends a row, sorted."""
        return tuple(sorted(self.eos_ids | self.stop_ids))


def make_stop_rules(
    text: TokenText | None,
    *,
    eos_ids: Iterable[int] = (),
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_in_thought: bool = True,
) -> StopRules:
    """Rules from the caller's arguments.

    A stop string that is a special token becomes a stop id: decoded text leaves special tokens
    out, so as a string it would never be met.

    Raises:
        ValueError: an empty stop string, or a stop string without a tokenizer.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not one for one in strings):
        raise ValueError("stop: expected texts of at least one character, got an empty string")
    if strings and text is None:
        raise ValueError("stop: expected a tokenizer for texts, got None; use stop_token_ids")
    special = {} if text is None else text.special
    names = set(special.values())
    texts = [one for one in strings if one not in names]
    composites = tuple(one for one in texts if any(name and name in one for name in names))
    ids = [token for token, name in special.items() if name in strings]
    return StopRules(
        eos_ids=frozenset(int(token) for token in eos_ids),
        stop_ids=frozenset([*map(int, stop_token_ids), *ids]),
        strings=tuple(one for one in texts if one not in composites),
        composites=composites,
        stop_in_thought=stop_in_thought,
    )


class Detokenizer:
    """Text of a growing list of tokens, piece by piece: together it is the text of them all.

    A token may hold part of a character, or a space that shows only behind its neighbours. So each
    new token is decoded together with the ones since the last clean break, and with those since
    the break before, since decoders treat a text's first token in their own ways.

        ids      ... | a  b | c  d
        window         ^             decoded again each time, for context
        read                ^        where the last clean break was

    What later tokens may still change is held back: a last replacement character, which more bytes
    may complete, and a run of byte tokens, all of which a byte that does not fit would spoil. The
    window is bounded, so the time is linear in the number of tokens.

    Args:
        text: from ids to text.
        with_special: keep special tokens in the text.
    """

    def __init__(self, text: TokenText, *, with_special: bool = False):
        self._text, self._with_special = text, with_special
        self._window: list[int] = []
        self._read = 0
        self._shown = 0  # characters of the window's text that were given out already

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete, possibly empty."""
        visible = [token for token in ids if self._with_special or token not in self._text.special]
        self._window.extend(visible)
        if not visible or self._text.is_byte(visible[-1]):
            return ""
        text = self._decode()
        stable = text.removesuffix(_REPLACEMENT)
        piece = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if stable == text:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._shown = len(self._decode())
        elif len(self._window) > _LONGEST_WINDOW:  # bytes that have long been no character
            self._window = self._window[-_KEPT:]
            self._read = 0
            self._shown = len(self._decode().removesuffix(_REPLACEMENT))
        return piece

    @property
    def pending(self) -> str:
        """What a last byte token would show if nothing followed it: a line break, say.

        Of runs so long that to decode them at each of their bytes would take long, it is empty.
        """
        window = self._window
        if not window or len(window) > _LONGEST_WINDOW or not self._text.is_byte(window[-1]):
            return ""
        return self._decode().removesuffix(_REPLACEMENT)[self._shown :]

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        text = self._decode()
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _decode(self) -> str:
        return self._text.decode(self._window, with_special=self._with_special)


class _StopSearch:
    """A growing text, and where the first of some stop strings begins in it.

    Args:
        strings: what is sought.
        in_thought: also within thoughts; else neither there, nor in the blanks that follow a
            thought, which are no part of the answer.
        opened: the text begins within a thought.
    """

    def __init__(self, strings: Sequence[str], *, in_thought: bool, opened: bool):
        self.text = ""
        self.found: int | None = None
        self._strings = strings
        self._in_thought, self._inside = in_thought, opened and not in_thought
        self._skips = False  # the blanks behind a thought
        self._from = 0  # nothing before it is looked at again
        self._longest = max([*map(len, strings), 1 if in_thought else LONGEST_MARKER])

    def extend(self, piece: str) -> None:
        self.text += piece
        while piece and self._strings and self.found is None:
            if self._inside:
                closing = CLOSING.search(self.text, self._from)
                if closing is None:
                    break
                self._inside, self._skips, self._from = False, True, closing.end()
            if self._skips:
                rest = self.text[self._from :].lstrip()
                self._skips, self._from = not rest, len(self.text) - len(rest)
            starts = [self.text.find(one, self._from) for one in self._strings]
            first = min((start for start in starts if start >= 0), default=-1)
            opening = None if self._in_thought else OPENING.search(self.text, self._from)
            if first >= 0 and not (opening and opening.start() < first):
                self.found = first
            elif opening:
                self._inside, self._from = True, opening.end()
            else:
                break
        self._from = max(self._from, len(self.text) - self._longest + 1)

    def finds_in(self, pending: str) -> bool:
        """Whether a string begins here once this piece is added, which it is not."""
        if not pending or not self._strings:
            return False
        ahead = copy.copy(self)
        ahead.text, ahead._from = self.text[self._from :], 0
        ahead.extend(pending)
        return ahead.found is not None

    @property
    def held_back(self) -> int:
        """Length of the longest end of the text that may be the beginning of a stop string."""
        return _held_back(self.text, self._strings)


class AnswerRow:
    """One row's new tokens, when it ends, and its text so far.

    Args:
        text: from ids to text.
        rules: what ends the row.
        max_new_tokens: its longest answer.
        streaming: keep the text up to date, for `take_text`. Stop strings need it anyway.
        opened: the prompt ends within a thought.
    """

    def __init__(
        self,
        text: TokenText,
        rules: StopRules,
        *,
        max_new_tokens: int,
        streaming: bool = False,
        opened: bool = False,
    ):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._token_text = text
        self._rules = rules
        self._max_new_tokens = max_new_tokens
        is_read = streaming or bool(rules.strings or rules.composites)
        self._detokenizer = Detokenizer(text) if is_read else None
        thoughts = {"in_thought": rules.stop_in_thought, "opened": opened}
        self._search = _StopSearch(rules.strings, **thoughts)
        # The text with its special tokens, where a stop string has some.
        self._raw = Detokenizer(text, with_special=True) if rules.composites else None
        self._raw_search = _StopSearch(rules.composites, **thoughts)
        self._raw_special: list[tuple[int, int]] = []  # where special tokens stand in it
        self._cut: int | None = None  # where a stop string begins
        self._taken = 0

    @property
    def is_done(self) -> bool:
        """Whether the row has ended."""
        return self.finish_reason is not None

    def push(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Add new tokens, up to the one that ends the row; the rest is dropped."""
        for at, token in enumerate(map(int, ids)):
            if self.is_done:
                return
            self.tokens.append(token)
            if logprobs is not None:
                self.logprobs.append(float(logprobs[at]))
            self._extend_raw(token)
            ends = token in self._rules.eos_ids or token in self._rules.stop_ids
            if self._detokenizer is not None and not ends:
                self._search.extend(self._detokenizer.push([token]))
            if self._meets_stop():
                self._finish("stop")
            elif ends:
                self._finish("eos" if token in self._rules.eos_ids else "stop")
            elif len(self.tokens) >= self._max_new_tokens:
                self._finish("length")

    @property
    def text(self) -> str:
        """The answer: no special tokens, no token that ended it, cut before a stop string."""
        if self._cut is not None:
            return self._search.text[: self._cut]
        ended_by_token = self.finish_reason in ("eos", "stop")
        return self._token_text.decode(self.tokens[:-1] if ended_by_token else self.tokens)

    def take_text(self) -> str:
        """Text since the last call that no later token can take back (streaming only)."""
        text = self._search.text
        if self._cut is not None:
            end = self._cut
        elif self.is_done:
            end = len(text)
        else:
            raw = self._raw_search
            held = max(self._search.held_back, self._visible(len(raw.text) - raw.held_back))
            end = len(text) - held
        piece = text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _meets_stop(self) -> bool:
        """Whether a stop string is in the text, or would be if the row ended here."""
        read = ((self._search, self._detokenizer), (self._raw_search, self._raw))
        return any(
            search.found is not None or (tokens is not None and search.finds_in(tokens.pending))
            for search, tokens in read
        )

    def _extend_raw(self, token: int) -> None:
        if self._raw is not None:
            self._raw_search.extend(self._raw.push([token]))
            name, end = self._token_text.special.get(token), len(self._raw_search.text)
            if name is not None:
                self._raw_special.append((end - len(name), end))

    def _visible(self, start: int) -> int:
        """Characters of the raw text from `start` on, special tokens not counted."""
        end = len(self._raw_search.text)
        hidden = 0
        for first, last in reversed(self._raw_special):
            if last <= start:
                break
            hidden += last - max(first, start)
        return end - start - hidden

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._detokenizer is None:
            return
        self._search.extend(self._detokenizer.finish())
        cuts = [] if self._search.found is None else [self._search.found]
        if self._raw is not None:
            self._raw_search.extend(self._raw.finish())
            start = self._raw_search.found
            if start is not None:
                cuts.append(len(self._search.text) - self._visible(start))
        if cuts:
            self._cut = min(cuts)
            self.finish_reason = "stop"


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
