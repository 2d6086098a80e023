"""What stands before every request: keys, sizes, and a line in the log that holds no prompt."""

import hmac
import logging
import os
import pathlib
import re
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swaa_jax.fields import naming, show
from swaa_jax.serve.errors import ApiError, error_response
from swaa_jax.serve.metrics import Metrics

__all__ = ["Guard", "read_keys", "read_limited"]

log = logging.getLogger(__name__)

KEYS = "SWAA_SERVE_KEYS"
"""The environment's variable with keys, separated by blanks or commas."""

_LEAST_KEY = 8


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """Keys of a file, a line each, and of the environment; none: everybody is let in.

    Raises:
        ValueError: a key too short to be one; it is not shown. A file without any.
        OSError: the file cannot be read.
    """
    lines = []
    if path is not None:
        with naming(path):
            lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if path is not None and not keys:
        raise ValueError(f"api_keys: expected a key a line in {path}, got none; write one")
    keys += os.environ.get(KEYS, "").replace(",", " ").split()
    if any(len(key) < _LEAST_KEY for key in keys):
        raise ValueError(
            f"api_keys: expected keys of at least {_LEAST_KEY} characters, got a shorter one; "
            "choose another"
        )
    if not all(re.fullmatch(r"[!-~]+", key) for key in keys):  # no client could send it
        raise ValueError(
            "api_keys: expected visible ASCII characters without spaces, got others (the key is "
            "not shown); choose another, and put comments on lines of their own"
        )
    return tuple(key.encode() for key in keys)


class Guard:
    """Refuses who has no key where one is needed, and logs how each request went.

    Args:
        app: behind it.
        keys: that are let in; none: everybody is.
        metrics: told of each request.
        protected: beginnings of paths that need a key.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[bytes], metrics: Metrics, protected: Sequence[str]
    ):
        self._app, self._keys, self._metrics = app, tuple(keys), metrics
        self._protected = tuple(protected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_protected = scope["path"].startswith(self._protected)
        self._metrics.open.inc(is_protected)
        try:
            if is_protected and not self._is_known(Request(scope)):
                await error_response(_NO_KEY)(scope, receive, sent)
            else:
                await self._app(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - start
            self._metrics.open.dec(is_protected)
            self._metrics.request(scope["path"], status, seconds)
            log.log(
                # What watches the server asks every few seconds.
                logging.INFO if is_protected else logging.DEBUG,
                "%s %s %s %.3f s",
                scope["method"],
                _shown(scope["path"]),
                status,
                seconds,
            )

    def _is_known(self, request: Request) -> bool:
        if not self._keys:
            return True
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        # All are compared, each in constant time: how long it takes says nothing.
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0


_NO_KEY = ApiError(
    "Authorization: expected a key of this server, Bearer ..., got none or another",
    status=401,
    kind="authentication_error",
    code="invalid_api_key",
)


async def read_limited(request: Request, *, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413, it has more bytes than allowed; 415, it is compressed.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(
            f"body: expected one that is not compressed, got {show(coding)}; send it plain",
            status=415,
            code="unsupported_media_type",
        )
    too_large = ApiError(
        f"body: expected at most {most:,} bytes, got more; send less, or several requests",
        status=413,
        code="request_too_large",
    )
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise too_large
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise too_large
    return bytes(content)


def _shown(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path[:100])
