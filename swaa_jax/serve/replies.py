"""OpenAI's objects for answers: whole ones, and the chunks of streams."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from swaa_jax.serve.answers import Choice, Piece, TokenScore
from swaa_jax.serve.requests import Asked, ChatBody
from swaa_jax.serve.sections import Part

__all__ = ["Reply", "models_body"]


@dataclasses.dataclass(kw_only=True)
class Reply:
    """How one request is answered.

    Args:
        id: of the answer.
        asked: what was asked.
        row_bytes: of keys and values of a row of so many tokens.
        created: seconds since 1970.
    """

    id: str
    asked: Asked
    row_bytes: Callable[[int], int]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self._is_chat = isinstance(self.asked.body, ChatBody)
        self._began: set[int] = set()
        self._num_calls: dict[int, int] = {}
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece], choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        by_choice: dict[int, list[Piece]] = {choice.index: [] for choice in choices}
        for piece in pieces:
            by_choice[piece.index].append(piece)
        make = self._chat_choice if self._is_chat else self._text_choice
        return self._object(
            "chat.completion" if self._is_chat else "text_completion",
            [make(index, own) for index, own in by_choice.items()],
            usage=self.usage(choices),
        )

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any token: the role of a chat's answers, an echoed prompt."""
        indices = range(len(self.asked.requests))
        if self._is_chat:
            return [
                self._chunk({"index": at, "delta": {"role": "assistant", "content": ""}})
                for at in indices
            ]
        if self.asked.body.echo:  # pyright: ignore[reportAttributeAccessIssue]
            return [self._chunk({"index": at, "text": self._prompt(at)}) for at in indices]
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream sends of a piece."""
        deltas: list[dict[str, Any]] = []
        if self._is_chat:
            found = [delta for part in piece.parts for delta in self._deltas(piece, part)]
            deltas = [{"delta": delta} for delta in found]
            if piece.scores and not deltas:
                deltas = [{"delta": {}}]
            if piece.scores:
                deltas[0]["logprobs"] = _chat_scores(piece.scores)
            if piece.finish_reason:
                deltas.append({"delta": {}})
        else:
            text = "".join(part.text for part in piece.parts)
            if text or piece.scores or piece.finish_reason:
                deltas = [{"text": text, "logprobs": self._text_scores(piece.index, piece.scores)}]
        if deltas:
            deltas[-1]["finish_reason"] = piece.finish_reason
        return [self._chunk({"index": piece.index, **delta}) for delta in deltas]

    def last(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """Chunks behind the last token: the usage, where it was asked for."""
        if not self.asked.body.include_usage:
            return []
        return [self._object(self._chunk_kind, [], usage=self.usage(choices))]

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Tokens that were read and drawn, and how many were not read anew."""
        prompts = sum(map(len, self.asked.prompts))
        new = sum(len(choice.tokens) for choice in choices)
        n = self.asked.body.n
        # Of each prompt what its first choice reused: the others find it read by then.
        cached = sum(choice.reused_tokens for choice in choices[::n])
        rows = [
            len(r.tokens) + len(c.tokens) for r, c in zip(self.asked.requests, choices, strict=True)
        ]
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "swaa_cache_bytes": sum(map(self.row_bytes, rows)),  # ours: keys and values
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _object(
        self, kind: str, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        found = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.served.name,
            "choices": choices,
        }
        return found if usage is None else found | {"usage": usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._object(self._chunk_kind, [{"logprobs": None, "finish_reason": None} | choice])

    def _deltas(self, piece: Piece, part: Part) -> list[dict[str, Any]]:
        if part.kind == "reasoning":
            return [{"reasoning_content": part.text}]
        if part.call is None:
            return [{"content": part.text}]
        at = self._num_calls.get(piece.index, 0)
        self._num_calls[piece.index] = at + 1
        begin = {"index": at, **_call(part)}
        arguments = begin["function"]["arguments"]
        begin["function"] = {**begin["function"], "arguments": ""}
        return [
            {"tool_calls": [begin]},
            {"tool_calls": [{"index": at, "function": {"arguments": arguments}}]},
        ]

    def _chat_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts = [part for piece in pieces for part in piece.parts]
        calls = [_call(part) for part in parts if part.call is not None]
        content, reasoning = (_text(parts, kind) for kind in ("content", "reasoning"))
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if not calls:
            message["content"] = content
        else:
            message["tool_calls"] = calls
        if reasoning:
            message["reasoning_content"] = reasoning
        scores = [score for piece in pieces for score in piece.scores]
        return {
            "index": index,
            "message": message,
            "logprobs": None if self.asked.body.num_top is None else _chat_scores(scores),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _text_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = _text([part for piece in pieces for part in piece.parts], "content")
        if self.asked.body.echo:  # pyright: ignore[reportAttributeAccessIssue]
            text = self._prompt(index) + text
        scores = [score for piece in pieces for score in piece.scores]
        return {
            "index": index,
            "text": text,
            "logprobs": self._text_scores(index, scores),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _prompt(self, index: int) -> str:
        return self.asked.served.text.decode(self.asked.requests[index].tokens)

    def _text_scores(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.asked.body.num_top is None:
            return None
        offset, offsets = self._offsets.get(index, 0), []
        for score in scores:
            offsets.append(offset)
            offset += len(score.token)
        self._offsets[index] = offset
        return {
            "tokens": [score.token for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [dict(score.top) for score in scores],
            "text_offset": offsets,
        }


def models_body(
    names: Iterable[str], *, created: int, details: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of `/v1/models`.

    Args:
        names: of the models.
        created: when the server began, seconds since 1970.
        details: more of each, by name.
    """
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": created, "owned_by": "swaa_jax"}
            | dict(details[name])
            for name in names
        ],
    }


def event(body: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _call(part: Part) -> dict[str, Any]:
    assert part.call is not None
    return {
        "id": part.call.id,
        "type": "function",
        "function": {"name": part.call.name, "arguments": part.call.arguments},
    }


def _text(parts: Sequence[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {
        "content": [
            entry(score.token, score.logprob)
            | {"top_logprobs": [entry(token, logprob) for token, logprob in score.top]}
            for score in scores
        ],
        "refusal": None,
    }
