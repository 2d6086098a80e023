"""Models of a server that speaks OpenAI's API, asked over `/v1/completions` with token ids."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import httpx2

from swaa_jax.bench.cells import Cell
from swaa_jax.bench.measure import Measurement, Timeline
from swaa_jax.bench.workload import Planned, Workload
from swaa_jax.documents import parse_json
from swaa_jax.fields import first_of, nearest, show
from swaa_jax.remote import BROKEN, Endpoint, NoStreamError, listed_models

__all__ = ["server_cells", "server_models"]

_USAGE = {"include_usage": True}
_WISHES: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {**_USAGE, "continuous_usage_stats": True}},
    {"ignore_eos": True, "stream_options": _USAGE},
    {"stream_options": _USAGE},
    {},
)
"""What a server is asked besides OpenAI's oldest fields, until it takes it: answers of full length,
and how many tokens there are, in every event or at the end."""

_REFUSALS = (400, 422)
_TOO_MUCH = (*_REFUSALS, 413)
_NO_ENTRY = (401, 403)
_KEY_ADVICE = "set a key that it takes in SWAA_BENCH_API_KEY"
_TOKENS_TO_WARM_UP = 2
_LIST_SECONDS = 60.0
_SPARE_PIECES = 16
_MOST_COUNT = 2**53  # tokens, or bytes; more is no count


def server_models(endpoint: Endpoint, names: Sequence[str]) -> list[str]:
    """Those of these names, or the server's only model where none is given.

    Raises:
        ValueError: a name that the server does not list; several models and no name; or a server
            that cannot be asked.
    """
    try:
        reply = endpoint.get("/models", timeout_s=_LIST_SECONDS)
        listed = list(listed_models(reply))
    except BROKEN as error:
        raise _unanswered(endpoint, error) from error
    if not reply.is_ok and not names:
        advice = "check the URL, which ends with /v1 as a rule, or name a model"
        raise ValueError(
            f"url: expected {endpoint.shown}/models to list the server's models, got "
            f"{reply.status} {endpoint.message_of(reply.body)}; "
            f"{_KEY_ADVICE if reply.status in _NO_ENTRY else advice}"
        )
    unknown = next((name for name in names if listed and name not in listed), None)
    if unknown is not None:
        raise ValueError(
            f"models: expected one of the server's models, {first_of(listed)}, got {show(unknown)}"
            f"{nearest(unknown, listed)}; name one of them"
        )
    if names:
        return list(names)
    if len(listed) != 1:
        raise ValueError(
            f"models: expected names of the server's models, which are "
            f"{first_of(listed) or 'not listed'}, got none; name one or several"
        )
    return listed


def server_cells(
    endpoint: Endpoint,
    names: Sequence[str],
    workload: Workload,
    *,
    vocab_size: int,
    request_s: float = 3600.0,
    max_seconds: float | None = None,
) -> list[Cell]:
    """A server's models.

    Args:
        endpoint: the server.
        names: that it gives its models.
        workload: the requests.
        vocab_size: prompts are tokens below it.
        request_s: that a request may take; then it has failed.
        max_seconds: after which a model's measurement is cut off.
    """
    cells = []
    for name in names:
        measurement = Measurement(name=name, model=name)

        def run(
            tell: Callable[[], None], name: str = name, measurement: Measurement = measurement
        ) -> None:
            client = _Client(endpoint, name, measurement, tell=tell, request_s=request_s)
            asyncio.run(client.measure(workload, vocab_size, max_seconds))

        cells.append(Cell(measurement=measurement, run=run))
    return cells


class _Client:
    """Asks one model; there is one event loop, and a connection for each request at a time."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        measurement: Measurement,
        *,
        tell: Callable[[], None],
        request_s: float,
    ):
        self._endpoint, self._model, self._measurement = endpoint, model, measurement
        self._tell, self._request_s = tell, request_s
        self._wishes: Mapping[str, Any] = {}
        self._start = time.perf_counter()

    async def measure(self, workload: Workload, vocab_size: int, most_s: float | None) -> None:
        """Warms up, then sends all requests.

        Raises:
            ValueError: the server does not answer the first request.
        """
        planned = workload.plan(vocab_size)
        async with self._endpoint.opened_client() as http:
            prompt = workload.warm_up(vocab_size, workload.prompt_tokens.most)
            self._wishes = await self._accepted(http, prompt)
            if workload.shared_prefix:  # what goes on from a beginning may be a program of its own
                await self._accepted(http, prompt)
            self._measurement.details = {"fields_taken": dict(self._wishes)}
            self._measurement.timelines = [Timeline.of(one) for one in planned]
            pairs = list(zip(planned, self._measurement.timelines, strict=True))
            self._start = time.perf_counter()
            try:
                async with asyncio.timeout(most_s):
                    await self._send_all(http, pairs, workload.concurrency)
            except TimeoutError:
                self._measurement.stopped = "time"
            finally:
                self._measurement.duration_s = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _accepted(self, http: httpx2.AsyncClient, prompt: list[int]) -> Mapping[str, Any]:
        """The wishes that the server takes, from a first request, which also warms it up."""
        error: BaseException | None = None
        for wishes in _WISHES:
            timeline = Timeline(number=0, prompt_tokens=len(prompt), asked_tokens=2, arrival=0.0)
            try:
                await self._ask(http, timeline, prompt, _TOKENS_TO_WARM_UP, wishes)
                return wishes
            except NoStreamError as refusal:
                error = refusal
                if refusal.status not in _REFUSALS:
                    break
            except BROKEN as broken:
                error = broken
                break
        assert error is not None
        raise _unanswered(
            self._endpoint, error, asked=f"a prompt of {len(prompt)} tokens"
        ) from error

    async def _send_all(
        self,
        http: httpx2.AsyncClient,
        pairs: Sequence[tuple[Planned, Timeline]],
        concurrency: int | None,
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            if concurrency is None:
                for planned, timeline in pairs:
                    tasks.create_task(self._send_at_its_time(http, planned, timeline))
                return
            waiting = iter(pairs)

            async def send_one_by_one() -> None:
                for planned, timeline in waiting:
                    timeline.arrival = self._now()
                    await self._send(http, planned, timeline)

            for _ in range(min(concurrency, len(pairs))):
                tasks.create_task(send_one_by_one())

    async def _send_at_its_time(
        self, http: httpx2.AsyncClient, planned: Planned, timeline: Timeline
    ) -> None:
        await asyncio.sleep(max(0.0, (planned.arrival or 0.0) - self._now()))
        await self._send(http, planned, timeline)

    async def _send(self, http: httpx2.AsyncClient, planned: Planned, timeline: Timeline) -> None:
        """One request; what goes wrong is written down."""
        timeline.sent = self._now()
        try:
            prompt = planned.tokens.tolist()
            await self._ask(http, timeline, prompt, planned.output_tokens, self._wishes)
        except BROKEN as error:
            told = str(error) or type(error).__name__
            timeline.fail(self._endpoint.excerpt(told))
        self._tell()

    async def _ask(
        self,
        http: httpx2.AsyncClient,
        timeline: Timeline,
        prompt: list[int],
        output_tokens: int,
        wishes: Mapping[str, Any],
    ) -> None:
        """One request.

        Raises:
            BROKEN: it failed.
        """
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            **wishes,
        }
        answer = _Answer(timeline)
        events = self._endpoint.events("/completions", body, timeout_s=self._request_s, client=http)
        async with contextlib.aclosing(events):  # at once, also where an event is wrong
            async for data in events:
                answer.read(data, self._now())
        answer.finish()


class _Answer:
    """A stream's events, as they come, into the timeline of its request."""

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._counted: int | None = None  # tokens so far, where every event says it
        self._finished_at: float | None = None
        self._is_done = False

    def read(self, data: str, now: float) -> None:
        """Takes an event.

        Raises:
            ValueError: it is an error, or none of the API's.
        """
        if data == "[DONE]":
            self._is_done = True
            return
        event = parse_json(data)
        if not isinstance(event, Mapping):
            raise ValueError(f"expected events that are JSON objects, got {show(data)}")
        if event.get("error"):
            raise ValueError(f"the server ended the stream with {json.dumps(event['error'])}")
        usage, choices = event.get("usage"), event.get("choices")
        usage = usage if isinstance(usage, Mapping) else {}
        choice = choices[0] if isinstance(choices, list) and choices else None
        count = usage.get("completion_tokens")
        if isinstance(choice, Mapping):
            self._piece(choice, count if _is_count(count) else None, now)
        self._read_usage(usage)

    def _piece(self, choice: Mapping[str, Any], count: int | None, now: float) -> None:
        if choice.get("finish_reason"):
            self._finished_at = now
        if count is not None:
            new, self._counted = count - (self._counted or 0), count
        else:
            new = 1 if choice.get("text") else 0
        if new > 0:
            self._timeline.pieces.append((now, new))
            if len(self._timeline.pieces) > 2 * self._timeline.asked_tokens + _SPARE_PIECES:
                raise ValueError(
                    f"expected at most {self._timeline.asked_tokens} tokens, as asked, got more"
                )

    def _read_usage(self, usage: Mapping[str, Any]) -> None:
        timeline, details = self._timeline, usage.get("prompt_tokens_details")
        reused = details.get("cached_tokens") if isinstance(details, Mapping) else None
        for field, value in (
            ("reported_tokens", usage.get("completion_tokens")),
            ("prompt_tokens", usage.get("prompt_tokens")),
            ("reused_tokens", reused),
            ("cache_bytes", usage.get("swaa_cache_bytes")),
        ):
            if _is_count(value):
                setattr(timeline, field, value)

    def finish(self) -> None:
        """The stream is over.

        Raises:
            ValueError: before the answer was.
        """
        timeline = self._timeline
        if self._finished_at is None and not self._is_done:
            raise ValueError("the stream ended before the answer did")
        end = self._finished_at
        if end is None and timeline.pieces:
            end = timeline.pieces[-1][0]
        if end is None or (not timeline.pieces and not timeline.reported_tokens):
            raise ValueError("the server answered with no tokens")
        if not timeline.pieces:  # tokens without text
            timeline.pieces.append((end, timeline.reported_tokens or 0))
        timeline.end = end


def _is_count(value: object) -> TypeGuard[int]:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return 0 <= value <= _MOST_COUNT


def _unanswered(endpoint: Endpoint, error: BaseException, *, asked: str = "") -> ValueError:
    told = endpoint.excerpt(str(error) or type(error).__name__)
    told = told.removeprefix("expected a stream, got ")
    status = error.status if isinstance(error, NoStreamError) else None
    expected = f"a server that answers at {endpoint.shown}"
    advice = "check the URL, which ends with /v1 as a rule"
    if status in _TOO_MUCH:
        expected = f"{endpoint.shown} to take {asked}"
        advice = "ask for shorter prompts and answers, or for a smaller vocab_size"
    elif status in _NO_ENTRY:
        advice = _KEY_ADVICE
    return ValueError(f"url: expected {expected}, got {told}; {advice}")
