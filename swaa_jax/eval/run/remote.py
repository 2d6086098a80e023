"""A model behind a URL: what its server says of it, and its answers.

Requests hold OpenAI's own fields, and in addition what servers of open models take: settings whose
value changes nothing, lest the server's own defaults do, and the chat template's variables. Where a
server refuses these, they are left out, and each answer says which.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import httpx2

from swaa_jax.chats import CLOSING
from swaa_jax.documents import parse_json
from swaa_jax.eval.run.entries import API_KEY, RemoteEntry
from swaa_jax.eval.run.store import AnswerRecord
from swaa_jax.fields import describe, first_of, nearest, show
from swaa_jax.infer import GenerateOptions
from swaa_jax.remote import BROKEN, HttpReply, listed_models, retry_after, run_apart

__all__ = ["Prompt", "RemoteModel"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_LIST_SECONDS = 60.0
_PAUSE_S = 1.0
"""Before a second request, where the first one failed; twice as long each time."""
_REFUSALS = (400, 422)
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What changes nothing, in servers' words; left unsaid, a server takes the checkpoint's own."""

_THINK, _END_OF_THOUGHT = "<think>", "</think>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a server is sent of a sample.

    Attributes:
        tokens: ids of the whole prompt, for completions; None: a chat.
        messages, tools: of the chat.
        thinking: the template's `enable_thinking`.
    """

    tokens: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Any] | None = None
    thinking: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        if self.tokens is not None:
            return {"tokens": list(self.tokens)}
        return {
            "messages": [dict(message) for message in self.messages],
            "tools": None if self.tools is None else list(self.tools),
            "thinking": self.thinking,
        }


class RemoteModel:
    """Asks one model of a server.

    Args:
        entry: which.

    Raises:
        ValueError: the server cannot be talked to, or has no such model.
    """

    def __init__(self, entry: RemoteEntry):
        self._entry, self._endpoint = entry, entry.endpoint
        listed = _run(self._listed())
        self.name = self._chosen(listed)
        """Of the model, at the server."""
        about = (listed or {}).get(self.name, {})
        room = about.get("max_model_len")
        self.room = room if isinstance(room, int) and not isinstance(room, bool) else None
        """Tokens of prompt and answer together, where the server tells."""
        self._about = {
            name: about[name]
            for name in ("policy", "root", "max_model_len")
            if isinstance(about.get(name), str | int)
        }
        self._refused: frozenset[str] | None = None  # fields; None: nothing was asked yet

    @property
    def policy_text(self) -> str:
        """What the server says of its policy, and where it is."""
        policy = self._about.get("policy")
        where = f"{self.name} at {self._endpoint.shown}"
        return f"{where}, which says: {str(policy)[:200]}" if policy else where

    def describe(self) -> dict[str, Any]:
        """What is known of it, without secrets: answers are kept under it."""
        return {"url": self._endpoint.shown, "model": self.name, **self._about}

    def answer(
        self,
        prompts: Mapping[int, Prompt],
        options: GenerateOptions,
        keep: Callable[[AnswerRecord], None],
    ) -> None:
        """Answers prompts, several at a time, each kept as it comes.

        A row's draws depend on `options.seed` and its number.

        Args:
            prompts: by row.
            options: how they are answered.
            keep: called with each row's record.

        Raises:
            ValueError: the server refuses a request, or does not answer in all attempts.
        """
        _run(self._answer_all(prompts, options, keep))

    async def _answer_all(
        self,
        prompts: Mapping[int, Prompt],
        options: GenerateOptions,
        keep: Callable[[AnswerRecord], None],
    ) -> None:
        waiting = iter(prompts.items())
        async with self._endpoint.opened_client() as http:

            async def ask_one_by_one(most: int | None = None) -> None:
                for count, (row, prompt) in enumerate(waiting, start=1):
                    keep(await self._ask(http, row, prompt, options))
                    if count == most:
                        return

            await ask_one_by_one(1)  # finds out which fields the server takes
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(min(self._entry.concurrency, len(prompts) - 1)):
                        tasks.create_task(ask_one_by_one())
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _ask(
        self, http: httpx2.AsyncClient, row: int, prompt: Prompt, options: GenerateOptions
    ) -> dict[str, Any]:
        path = "/chat/completions" if prompt.tokens is None else "/completions"
        rungs = _ladder(prompt, options)
        wanted = rungs[0]
        if self._refused is not None:
            rungs = [{k: v for k, v in wanted.items() if k not in self._refused}]
        refusal: ValueError | None = None
        for extras in rungs:
            start = time.perf_counter()
            body = {**self._body(row, prompt, options), **extras}
            reply = await self._reply(http, "POST", path, body)
            if reply.is_ok:
                seconds = round(time.perf_counter() - start, 6)
                left_out = sorted(set(wanted) - set(extras))
                self._settle(left_out)
                record = self._read(reply.body, row, prompt)
                return record | {"seconds": seconds, "left_out": left_out}
            refusal = self._refusal(path, reply)
            if reply.status not in _REFUSALS:
                break
        assert refusal is not None
        raise refusal

    def _settle(self, left_out: Sequence[str]) -> None:
        """Leaves out what was not taken, from now on, and says so."""
        if self._refused is not None:
            return
        self._refused = frozenset(left_out)
        if left_out:
            log.warning(
                "%s: expected a server that takes %s, got one that refuses; left out, so that its "
                "own defaults hold",
                self._entry.label,
                ", ".join(left_out),
            )

    def _body(self, row: int, prompt: Prompt, options: GenerateOptions) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "max_tokens": options.max_new_tokens,
            "temperature": 0.0 if options.is_greedy else options.temperature,
            "top_p": 1.0 if options.top_p is None else options.top_p,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "seed": row_seed(options.seed, row),
            **_chosen_extensions(options),
        }
        if prompt.tokens is not None:
            return body | {"prompt": list(prompt.tokens)}
        body["messages"] = [dict(message) for message in prompt.messages]
        return body if prompt.tools is None else body | {"tools": list(prompt.tools)}

    async def _reply(
        self,
        http: httpx2.AsyncClient | None,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float | None = None,
    ) -> HttpReply:
        """A reply that another request would not better.

        Raises:
            ValueError: there was none in all attempts.
        """
        problem = ""
        for attempt in range(self._entry.attempts):
            pause = _PAUSE_S * 2**attempt
            try:
                reply = await self._endpoint.request(
                    method, path, body, timeout_s=timeout_s or self._entry.timeout_s, client=http
                )
                if not reply.is_worth_another_try and not _was_aborted(reply):
                    return reply
                problem = f"{reply.status} {reply.reason}"
                pause = retry_after(reply.retry_after, default=pause)
            except BROKEN as error:
                problem = self._endpoint.excerpt(f"{type(error).__name__}: {error}")
            if attempt + 1 < self._entry.attempts:
                log.info("%s: %s; again in %.3g s", self._entry.label, problem, pause)
                await asyncio.sleep(pause)
        raise ValueError(
            f"{self._entry.label}: expected a reply from {self._endpoint.shown}{path} in "
            f"{self._entry.attempts} attempts, got {problem} at last; see whether it runs, and "
            "whether the url ends in /v1. What was answered is kept: the same command goes on there"
        )

    def _refusal(self, path: str, reply: HttpReply) -> ValueError:
        said = self._endpoint.message_of(reply.body)
        advice = "see the url, which ends in /v1 as a rule, the model and the settings"
        if reply.status in (401, 403):
            advice = f"set the environment's {self._entry.api_key_env or API_KEY} to the key"
        elif reply.status < 400:
            advice = "redirects are not followed: give the url that it leads to, if you trust it"
        elif self._entry.tokenizer is None and "context" in said:
            advice = "give the model's tokenizer, so that too_long: skip knows lengths beforehand"
        return ValueError(
            f"{self._entry.label}: expected {self._endpoint.shown}{path} to answer, got "
            f"{reply.status} {reply.reason}: {said}; {advice}"
        )

    async def _listed(self) -> dict[str, Mapping[str, Any]] | None:
        """What the server lists of each model; None: it has no list."""
        reply = await self._reply(None, "GET", "/models", None, _LIST_SECONDS)
        found = listed_models(reply)
        has_none = reply.is_ok or reply.status in (404, 405, 501)
        if not found and not (has_none and self._entry.model is not None):
            raise self._refusal("/models", reply)
        return found or None

    def _chosen(self, listed: Mapping[str, object] | None) -> str:
        """The model's name.

        Raises:
            ValueError: the server does not list it, or lists several and none is named.
        """
        name = self._entry.model
        if listed is None:
            assert name is not None
            return name
        names = [self._endpoint.excerpt(one) for one in listed]
        if name is None and len(listed) == 1:
            (name,) = listed
            log.info("%s: its only model is %s", self._entry.label, names[0])
        elif name is None or name not in listed:
            got = "no name" if name is None else f"{show(name)}{nearest(name, names)}"
            raise ValueError(
                f"{self._entry.label}: expected the name of one of the models of "
                f"{self._endpoint.shown}, {first_of(names) or 'which lists none'}, got {got}; set "
                "model"
            )
        return name

    def _read(self, content: bytes, row: int, prompt: Prompt) -> dict[str, Any]:
        """A record of the answer.

        Raises:
            ValueError: it is no completion, or one to another prompt.
        """
        try:
            document = parse_json(content)
            choice = document["choices"][0]
            if prompt.tokens is None:
                said, opened = _joined(choice, thinking=prompt.thinking)
            else:
                said, opened = choice["text"], None
            if not isinstance(said, str):
                raise TypeError(f"expected a text, got {describe(said)}")
            usage = document.get("usage") or {}
            read, new = (_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion"))
            reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            got = self._endpoint.excerpt(content.decode(errors="replace"))
            raise ValueError(
                f"{self._entry.label}: expected a completion with choices, got {got!r}; is "
                f"{self._endpoint.shown} an OpenAI-compatible server?"
            ) from error
        if prompt.tokens is not None and read not in (None, len(prompt.tokens)):
            raise ValueError(
                f"{self._entry.label}: expected {self._endpoint.shown} to read the "
                f"{len(prompt.tokens)} tokens that it was sent, got {read} in its usage; give the "
                "served model's tokenizer, or take api: chat"
            )
        return {
            "row": row,
            "response": said,
            "num_tokens": new,
            "finish_reason": reason if isinstance(reason, str) else "unknown",
            **({} if read is None else {"prompt_tokens": read}),
            **({} if opened is None else {"opened": opened}),
        }


def row_seed(seed: int, row: int) -> int:
    """The seed that a row's request has: servers know no numbers of rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:4]) >> 1


def _run(what: Coroutine[Any, Any, T]) -> T:
    """A coroutine's value; here, so that Ctrl-C ends it, unless this is a notebook's event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(what)
    return run_apart(what)


def _ladder(prompt: Prompt, options: GenerateOptions) -> list[dict[str, Any]]:
    """What a server is asked for in addition, until it takes it, from all to nothing."""
    neutral = {k: v for k, v in _NEUTRAL.items() if k not in _chosen_extensions(options)}
    template: dict[str, Any] = {}
    if prompt.tokens is None:
        template = {"chat_template_kwargs": {"enable_thinking": prompt.thinking}}
    rungs = [{**neutral, **template}, template, neutral, {}]
    return [rung for at, rung in enumerate(rungs) if rung not in rungs[:at]]


def _chosen_extensions(options: GenerateOptions) -> dict[str, Any]:
    """Settings beyond OpenAI's that the user set: a server that refuses them cannot be asked."""
    given = {"top_k": options.top_k, "min_p": options.min_p}
    given["repetition_penalty"] = options.repetition_penalty
    return {k: v for k, v in given.items() if v and v != _NEUTRAL[k]}


def _joined(choice: Mapping[str, Any], *, thinking: bool) -> tuple[str, bool]:
    """A chat's answer as the model's own text would be; and whether a thought was left open.

    An answer that was cut off, in the mode of thinking, with no sign of where the thought ends, is
    a part of the thought: the server does not set thoughts apart.
    """
    message, is_cut = choice["message"], choice.get("finish_reason") == "length"
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(thought, str):
        raise TypeError(f"expected texts, got {describe(content)} and {describe(thought)}")
    for call in message.get("tool_calls") or []:  # as models of Qwen's write them
        function = call["function"]
        told = json.dumps({"name": function["name"], "arguments": function["arguments"]})
        content += f"<tool_call>{told}</tool_call>"
    if not thought:
        return content, thinking and is_cut and not CLOSING.search(content)
    if not content and is_cut:
        return f"{_THINK}{thought}", True
    return f"{_THINK}{thought}{_END_OF_THOUGHT}{content}", False


def _was_aborted(reply: HttpReply) -> bool:
    """Whether an answer was ended by its server, which stopped: vLLM and SGLang say so."""
    return reply.is_ok and b'"abort"' in reply.body and _finish_reason(reply.body) == "abort"


def _finish_reason(body: bytes) -> object:
    try:
        return parse_json(body)["choices"][0]["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None  # pyright: ignore[reportReturnType]
