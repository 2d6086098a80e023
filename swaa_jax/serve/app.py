"""`make_app`: OpenAI's endpoints over an engine, as an ASGI application.

    /v1/models  /v1/chat/completions  /v1/completions     need a key, where there are keys
    /health  /metrics  /                                   do not

A request is encoded on a thread of its own, so that no other waits for it; its tokens come from the
engine's thread, and become text on the event loop.
"""

import asyncio
import contextlib
import dataclasses
import functools
import importlib.resources
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from swaa_jax.engine import Engine, EngineOptions
from swaa_jax.engine.engine import MEMORY_SHARE
from swaa_jax.fields import check_fields, flag, integer, number, show
from swaa_jax.serve.answers import Choice, Piece
from swaa_jax.serve.errors import ApiError, error_body, error_response, refused
from swaa_jax.serve.guard import Guard, read_limited
from swaa_jax.serve.hosts import LeadingEngine
from swaa_jax.serve.metrics import Metrics
from swaa_jax.serve.models import ServedModels
from swaa_jax.serve.replies import Reply, event, models_body
from swaa_jax.serve.requests import Asked, ChatBody, CompletionBody, read_body
from swaa_jax.serve.worker import BusyError, EngineFailedError, EngineWorker, Feed

__all__ = ["ServeOptions", "make_app", "make_engine"]

log = logging.getLogger(__name__)

_RETRY_AFTER = 1
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        most_requests: that are being answered or wait, choices counted; more are told to come back.
        most_body_bytes: of a request.
        most_prompts: of one request of `/v1/completions`.
        default_longest: tokens of an answer where the request does not say.
        request_s: seconds that a request may take, waiting included.
        drain_s: seconds that what is being answered has left when the server ends.
        log_prompts: write prompts to the log.
        warm_up: compile all programs before the first request is taken.

    Raises:
        ValueError: a value out of range.
    """

    most_requests: int = 256
    most_body_bytes: int = 8 << 20
    most_prompts: int = 64
    default_longest: int = 2048
    request_s: float = 600.0
    drain_s: float = 30.0
    log_prompts: bool = False
    warm_up: bool = True

    def __post_init__(self):
        check_fields(
            self,
            most_requests=integer(least=1),
            most_body_bytes=integer(least=1),
            most_prompts=integer(least=1),
            default_longest=integer(least=1),
            request_s=number(above=0),
            drain_s=number(least=0),
            log_prompts=flag,
            warm_up=flag,
        )


def make_engine(
    models: ServedModels, room: EngineOptions, *, memory_share: float = MEMORY_SHARE
) -> Engine:
    """This process's engine of the models; in several processes, 0's leads and others `follow`.

    Args:
        models: by name.
        room: for each model.
        memory_share: of each device, for the engine.

    Raises:
        ValueError: rooms that do not fit the memory.
    """
    kind = LeadingEngine if jax.process_count() > 1 and jax.process_index() == 0 else Engine
    named = {name: one.model for name, one in models.items()}
    return kind(named, room, memory_share=memory_share)


def make_app(
    models: ServedModels,
    engine: Engine,
    *,
    options: ServeOptions | None = None,
    keys: tuple[bytes, ...] = (),
) -> Starlette:
    """The application; `app.state.drain` ends its answers, for who serves it (`run_server`).

    Args:
        models: by name.
        engine: of these models, from `make_engine`; the application's own from now on.
        options: limits.
        keys: of which a client needs one; none: everybody is let in.
    """
    options = options or ServeOptions()
    end = engine.end if isinstance(engine, LeadingEngine) else lambda: None
    worker = EngineWorker(engine, most_requests=options.most_requests, on_end=end)
    room = max(one.max_tokens for one in engine.options.values())
    server = _Server(models, worker, options, room=room)
    num_left = 0

    async def drain() -> None:
        """Takes no more requests; those that are left are told when the time is over."""
        nonlocal num_left
        num_left += await worker.stop(within=options.drain_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            if options.warm_up:
                log.info("compiling the programs of %s", ", ".join(models))
                await worker.warm_up(list(models))
            yield
        finally:
            await drain()  # where `run_server` has not done it
            server.close()
            clock = worker.clock
            log.info(
                "served %d new tokens to %d prompt tokens (%d more reused); %s",
                clock.new_tokens,
                clock.read_tokens,
                clock.reused_tokens,
                f"{num_left} requests were cut off" if num_left else "nothing was cut off",
            )

    def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        return Route(path, handler, methods=[method])

    app = Starlette(
        routes=[
            route("/v1/models", server.list_models, "GET"),
            route("/v1/models/{name:path}", server.show_model, "GET"),
            route("/v1/chat/completions", server.chat, "POST"),
            route("/v1/completions", server.complete, "POST"),
            route("/health", server.health, "GET"),
            route("/metrics", server.metrics_text, "GET"),
            route("/", server.page, "GET"),
        ],
        middleware=[
            Middleware(Guard, keys=keys, metrics=server.metrics, protected=("/v1/",)),
        ],
        exception_handlers={
            ApiError: _refusal,
            HTTPException: _refusal,
            Exception: _refusal,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # else a host that the client names is in the answer
    app.state.drain = drain
    return app


class _Server:
    """The endpoints.

    Args:
        models: by name.
        worker: runs the engine.
        options: limits.
        room: tokens of a row.
    """

    def __init__(
        self, models: ServedModels, worker: EngineWorker, options: ServeOptions, *, room: int
    ):
        self._models, self._worker, self._options, self._room = models, worker, options, room
        self._created = int(time.time())
        self.metrics = Metrics(worker)
        self._num_reading = 0  # bodies that come, or are being encoded
        # One thread: tokenizers change settings of their own while they encode.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._page = (importlib.resources.files("swaa_jax.serve") / "page.html").read_text("utf-8")

    def close(self) -> None:
        """Encodes nothing any more."""
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def list_models(self, _: Request) -> Response:
        """`/v1/models`."""
        return JSONResponse(
            models_body(self._models, created=self._created, details=self._details())
        )

    async def show_model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        name = self._models.find(request.path_params["name"]).name
        body = models_body([name], created=self._created, details=self._details())
        return JSONResponse(body["data"][0])

    def _details(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            name: {
                "policy": str(one.model.policy),
                "max_model_len": min(self._room, one.room or self._room),
            }
            for name, one in self._models.items()
        }

    async def health(self, _: Request) -> Response:
        """`/health`: 200 as long as requests are answered."""
        failure = self._worker.failure
        body = {"status": "ok"} if failure is None else {"status": str(failure)}
        return JSONResponse(body, status_code=200 if failure is None else 503)

    async def metrics_text(self, _: Request) -> Response:
        """`/metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        """`/`: a page that needs nothing else."""
        return HTMLResponse(self._page)

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._answer(request, ChatBody, "chatcmpl-")

    async def complete(self, request: Request) -> Response:
        """`/v1/completions`."""
        return await self._answer(request, CompletionBody, "cmpl-")

    async def _answer(self, request: Request, kind: Any, prefix: str) -> Response:
        if self._worker.num_requests + self._num_reading >= self._options.most_requests:
            raise self._busy()  # before it takes memory
        self._num_reading += 1
        try:
            async with asyncio.timeout(self._options.request_s):
                content = await read_limited(request, most=self._options.most_body_bytes)
            asked = await asyncio.get_running_loop().run_in_executor(
                self._encoder, self._asked, kind, content
            )
        except ClientDisconnect:
            return Response(status_code=499)
        except TimeoutError as error:
            raise _too_slow() from error
        finally:
            self._num_reading -= 1
        served = asked.served
        if len(asked.requests) > self._options.most_requests:  # however long it waited
            raise ApiError(
                f"n: expected at most {self._options.most_requests} answers to a request, got "
                f"{len(asked.requests)}; send several requests",
                param="n",
            )
        if self._options.log_prompts:
            log.info("prompts: %r", [served.text.decode(ids) for ids in asked.prompts])
        reply = Reply(
            id=prefix + secrets.token_hex(12),
            asked=asked,
            row_bytes=functools.partial(self._worker.row_bytes, served.name),
        )
        answer = _Answer(asked, reply, self.metrics)
        try:
            feeds = await self._worker.submit(*asked.requests)
        except BusyError as error:
            raise self._busy() from error
        except EngineFailedError as error:
            raise _unavailable(error) from error
        except ValueError as error:
            raise refused(error) from error
        if asked.body.stream:
            stream = answer.stream(feeds, within=self._options.request_s)
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await answer.whole(feeds, request, within=self._options.request_s)

    def _asked(self, kind: type[ChatBody | CompletionBody], content: bytes) -> Asked:
        """On the encoder's thread: a long body takes seconds, and the event loop has others."""
        body = read_body(kind, content)
        first = next(iter(self._models))
        return Asked.of(
            body,
            self._models.find(first if body.model is None else body.model),
            room=self._room,
            default_longest=self._options.default_longest,
            most_prompts=self._options.most_prompts,
        )

    def _busy(self) -> ApiError:
        return ApiError(
            f"expected at most {self._options.most_requests} requests at a time, got more; come "
            "back later",
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=_RETRY_AFTER,
        )


class _Answer:
    """One request's choices, from their feeds to what the client gets."""

    def __init__(self, asked: Asked, reply: Reply, metrics: Metrics):
        self._asked, self._reply, self._metrics = asked, reply, metrics
        self._choices = [Choice(asked, at) for at in range(len(asked.requests))]
        self._start = time.perf_counter()
        self._first: float | None = None

    async def whole(self, feeds: list[Feed], request: Request, *, within: float) -> Response:
        """All of it at once, unless the client leaves before."""
        answering = asyncio.ensure_future(self._collect(feeds))
        leaving = asyncio.ensure_future(_left(request))
        try:
            done, _ = await asyncio.wait(
                {answering, leaving}, timeout=within, return_when=asyncio.FIRST_COMPLETED
            )
            if answering in done:
                return JSONResponse(self._reply.whole(answering.result(), self._choices))
            if leaving in done:
                self._metrics.cancelled.inc()
                return Response(status_code=499)
            raise _too_long()
        except EngineFailedError as error:
            raise _unavailable(error) from error
        finally:
            for task in (answering, leaving):
                task.cancel()
            for feed in feeds:
                feed.close()

    async def _collect(self, feeds: list[Feed]) -> list[Piece]:
        return [piece async for piece in self._pieces(feeds)]

    async def stream(self, feeds: list[Feed], *, within: float) -> AsyncIterator[bytes]:
        """Server-sent events; an error that comes later is one, too, and the last."""
        is_whole = False
        try:
            try:
                async with asyncio.timeout(within):
                    for chunk in self._reply.first():
                        yield event(chunk)
                    async for piece in self._pieces(feeds):
                        for chunk in self._reply.chunks(piece):
                            if self._asked.body.has_usage_throughout:
                                chunk["usage"] = self._reply.usage(self._choices)
                            yield event(chunk)
            except TimeoutError as error:
                raise _too_long() from error
            except EngineFailedError as error:
                raise _unavailable(error) from error
            for chunk in self._reply.last(self._choices):
                yield event(chunk)
            yield b"data: [DONE]\n\n"
            is_whole = True
        except ApiError as error:
            is_whole = True
            yield event(error_body(error))
        finally:
            for feed in feeds:
                feed.close()
            if not is_whole:
                self._metrics.cancelled.inc()

    async def _pieces(self, feeds: list[Feed]) -> AsyncIterator[Piece]:
        """Of all choices, as they come."""
        if len(feeds) == 1:
            async for piece in self._pieces_of(0, feeds[0]):
                yield piece
        else:
            arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

            async def follow(at: int, feed: Feed) -> None:
                try:
                    async for piece in self._pieces_of(at, feed):
                        arrived.put_nowait(piece)
                    arrived.put_nowait(None)
                except (ApiError, EngineFailedError) as error:
                    arrived.put_nowait(error)

            tasks = [asyncio.ensure_future(follow(at, feed)) for at, feed in enumerate(feeds)]
            try:
                left = len(tasks)
                while left:
                    piece = await arrived.get()
                    if isinstance(piece, Exception):
                        raise piece
                    if piece is None:
                        left -= 1
                    else:
                        yield piece
            finally:
                for task in tasks:
                    task.cancel()
        self._observe()

    async def _pieces_of(self, at: int, feed: Feed) -> AsyncIterator[Piece]:
        choice = self._choices[at]
        async for update in feed:
            if self._first is None and update.tokens:
                self._first = time.perf_counter()
                self._metrics.first_token.observe(self._first - self._start)
            piece = choice.push(update)
            if piece.parts or piece.scores or piece.finish_reason:
                yield piece
            if choice.is_done:
                feed.close()  # a stop text, which the engine does not know of
                return

    def _observe(self) -> None:
        new = sum(len(choice.tokens) for choice in self._choices)
        if self._first is not None and new > len(self._choices):
            seconds = time.perf_counter() - self._first
            self._metrics.token.observe(seconds / (new - len(self._choices)) * len(self._choices))


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return


def _unavailable(error: EngineFailedError) -> ApiError:
    return ApiError(
        f"{error}; try again later",
        status=503,
        kind="server_error",
        code="engine_unavailable",
        retry_after=_RETRY_AFTER,
    )


async def _refusal(request: Request, error: Exception) -> Response:  # a plain one has a thread
    if isinstance(error, HTTPException):
        got = f"got {request.method} {show(request.url.path)}"
        if error.status_code == 405:
            what, code = "method: expected one that the path takes", "method_not_allowed"
        else:
            what, code = f"path: expected one of {', '.join(_PATHS)}", "not_found"
        told = ApiError(f"{what}, {got}", status=error.status_code, code=code)
        response = error_response(told)
        response.headers.update(error.headers or {})  # which methods are allowed
        return response
    return error_response(error if isinstance(error, ApiError) else _INTERNAL)


def _too_long() -> ApiError:  # a new one each time: its traceback holds the request
    return ApiError(
        "the request took longer than this server allows; ask for less, or try again later",
        status=503,
        kind="server_error",
        code="timeout",
        retry_after=_RETRY_AFTER,
    )


def _too_slow() -> ApiError:
    return ApiError(
        "body: expected all of it within the time of a request, got a part; send it faster",
        status=408,
        code="timeout",
    )


_INTERNAL = ApiError(
    "the server failed; its log says why", status=500, kind="server_error", code="internal_error"
)
