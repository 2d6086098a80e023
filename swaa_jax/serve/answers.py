"""One choice of an answer, from the engine's tokens to the parts that a client gets."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from swaa_jax.engine import Update
from swaa_jax.infer.stopping import AnswerRow, TokenText
from swaa_jax.serve.errors import ApiError
from swaa_jax.serve.requests import Asked, ChatBody
from swaa_jax.serve.sections import Part, Sections

__all__ = ["Choice", "Piece", "TokenScore"]

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScore:
    """A token with its log-probability, and the likeliest in its place.

    Attributes:
        token: its text alone, special tokens included.
        logprob: natural.
        top: texts and log-probabilities.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of a choice.

    Attributes:
        index: the choice's.
        parts: in their order.
        scores: of the new tokens, where they were asked for.
        finish_reason: with the last piece.
    """

    index: int
    parts: tuple[Part, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """One answer to one prompt, as it grows.

    Args:
        asked: what was asked.
        index: among all choices of all prompts.
    """

    def __init__(self, asked: Asked, index: int):
        body, request = asked.body, asked.requests[index]
        opened = isinstance(body, ChatBody) and asked.served.opens_thought(request.tokens)
        self.index = index
        self._text: TokenText = asked.served.text
        self._num_top, self._ends = body.num_top, frozenset(asked.rules.all_ids)
        self._row = AnswerRow(
            self._text,
            asked.rules,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            opened=opened,
        )
        self._sections: Sections | None = None
        self._one_call = False
        if isinstance(body, ChatBody):
            self._sections = Sections(opened=opened, calls=body.offers_tools)
            self._one_call = body.parallel_tool_calls is False
        self._num_calls = 0
        self.reused_tokens = 0

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._row.is_done

    @property
    def tokens(self) -> Sequence[int]:
        """New ones, with the one that ended the answer."""
        return self._row.tokens

    def push(self, update: Update) -> Piece:
        """Takes new tokens; gives what is new for the client, perhaps nothing.

        Raises:
            ApiError: 500, the model's logits are not numbers.
        """
        self.reused_tokens = update.reused_tokens
        before = len(self._row.tokens)
        self._row.push(update.tokens)
        if update.reason == "not a number" and not self.is_done:
            raise ApiError(
                "the model's logits are not numbers: its weights or its number format are at fault",
                status=500,
                kind="server_error",
                code="bad_logits",
            )
        taken = len(self._row.tokens) - before
        text = self._row.take_text()
        if self._sections is None:
            parts = [Part(kind="content", text=text)] if text else []
        else:
            parts = self._sections.push(text)
            if self.is_done:
                parts += self._sections.finish()
        return Piece(
            index=self.index,
            parts=tuple(one for one in parts if self._is_kept(one)),
            scores=self._scores(update, taken) if self._num_top is not None else (),
            finish_reason=self._finish_reason(),
        )

    def _is_kept(self, part: Part) -> bool:
        if part.kind != "call":
            return True
        self._num_calls += 1
        return not self._one_call or self._num_calls == 1

    def _finish_reason(self) -> FinishReason | None:
        if not self.is_done:
            return None
        if self._row.finish_reason == "length":
            return "length"
        return "tool_calls" if self._num_calls else "stop"

    def _scores(self, update: Update, count: int) -> tuple[TokenScore, ...]:
        """Of the tokens that were taken, but for one that ended the answer."""
        if self._row.finish_reason in ("eos", "stop") and count:
            count -= self._ends_with_token()

        def text(token: int) -> str:
            return self._text.decode([token], with_special=True)

        return tuple(
            TokenScore(
                token=text(token),
                logprob=logprob,
                top=tuple((text(one), score) for one, score in top[: self._num_top]),
            )
            for token, logprob, top in zip(
                update.tokens[:count],
                update.logprobs[:count],
                update.top_logprobs[:count],
                strict=True,
            )
        )

    def _ends_with_token(self) -> bool:
        return self._row.tokens[-1] in self._ends
