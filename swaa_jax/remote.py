"""OpenAI-compatible servers of other people: one way to ask them, within limits, without secrets.

What a server says may be anything: a body has a limit of bytes and a deadline from the connection
to its last byte, redirects are refused, and what is shown of it, or of the URL, holds no key.
"""

import asyncio
import base64
import concurrent.futures
import dataclasses
import datetime
import email.utils
import functools
import json
import logging
import math
import re
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import httpx2

from swaa_jax.documents import parse_json
from swaa_jax.fields import wrong
from swaa_jax.limits import REPLY_BYTES
from swaa_jax.redact import redact, redact_url

__all__ = [
    "BROKEN",
    "Endpoint",
    "NoStreamError",
    "HttpReply",
    "excerpt",
    "listed_models",
    "retry_after",
    "run_apart",
]

BROKEN = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)
"""What `Endpoint` raises where a server cannot be talked to, or says what is no reply."""

_EXCERPT = 200  # characters of a reply in messages
_LONGEST_WAIT = 600.0
_MESSAGE = re.compile(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)')

T = TypeVar("T")


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


# It logs every request with the whole URL.
logging.getLogger("httpx2").addFilter(_without_secrets)


class NoStreamError(ValueError):
    """A server answered with something else than a stream.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, *, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpReply:
    """What a server said.

    Attributes:
        status, reason: of HTTP; the reason without secrets.
        retry_after: the header, as it came.
        body: all of it.
    """

    status: int
    reason: str
    retry_after: str | None
    body: bytes

    @property
    def is_ok(self) -> bool:
        """Whether it is an answer."""
        return self.status < 300

    @property
    def is_worth_another_try(self) -> bool:
        """Whether the server may say something else later."""
        return self.status in (408, 409, 429) or self.status >= 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server's API.

    Args:
        url: as in `http://localhost:8000/v1`; a password or a query in it is never shown.
        api_key: sent as a bearer token, and never shown; None: no such header.

    Raises:
        ValueError: no URL of HTTP, or a key that no header takes.
    """

    url: str = dataclasses.field(repr=False)
    api_key: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        _check_url(self.url)
        _check_key(self.api_key, self.url)

    @property
    def shown(self) -> str:
        """The URL, for messages."""
        return redact_url(self.url)

    @functools.cached_property
    def secrets(self) -> list[str]:
        """All that must not be shown, in the forms in which a server may echo it."""
        parts = urllib.parse.urlsplit(self.url)
        user = parts.netloc.rpartition("@")[0]
        found = [self.api_key or "", user, urllib.parse.unquote(parts.password or "")]
        found += [parts.password or ""]
        found += [base64.b64encode(urllib.parse.unquote(user).encode()).decode()]
        for part in parts.query.split("&"):  # a value, or all of a part that has no name
            value = part.partition("=")[2] if "=" in part else part
            found += [value, urllib.parse.unquote(value), urllib.parse.unquote_plus(value)]
        return [secret for secret in found if secret]

    def excerpt(self, text: str) -> str:
        """A part of what a server said, or of an error, without our secrets."""
        return excerpt(redact(text, self.secrets))

    def message_of(self, body: bytes) -> str:
        """What a refusal says: its error's message where it has one, else its beginning.

        The body may be cut off anywhere.
        """
        said = self.excerpt(body[: 20 * _EXCERPT].decode(errors="replace"))
        found = _MESSAGE.search(body[: 20 * _EXCERPT].decode(errors="replace"))
        if found is None:
            return said
        try:
            return self.excerpt(json.loads(f'"{found[1]}"')) or said
        except ValueError:  # cut off within an escape
            return said

    def post(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float, most_bytes: int = REPLY_BYTES
    ) -> HttpReply:
        """The reply to a JSON body, in full.

        Args:
            path: behind the URL's own, as in `/chat/completions`.
            body: as plain data.
            timeout_s: from the connection to the last byte.
            most_bytes: of the reply.

        Raises:
            ValueError: beyond the limit, or the deadline.
            httpx2.HTTPError: the connection broke.
        """
        return run_apart(self.request("POST", path, body, timeout_s=timeout_s, most=most_bytes))

    def get(self, path: str, *, timeout_s: float, most_bytes: int = REPLY_BYTES) -> HttpReply:
        """The reply to a request without a body; raises as `post`."""
        return run_apart(self.request("GET", path, None, timeout_s=timeout_s, most=most_bytes))

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        timeout_s: float,
        most: int = REPLY_BYTES,
        client: httpx2.AsyncClient | None = None,
    ) -> HttpReply:
        """As `post`, on an event loop, and over a client's connections where one is given."""
        found = bytearray()
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._opened(client) as opened,
                self._sent(opened, method, path, body) as response,
            ):
                async for chunk in response.aiter_raw():
                    found += chunk
                    if len(found) > most:
                        raise ValueError(f"expected a reply of at most {most} bytes, got more")
                return HttpReply(
                    status=response.status_code,
                    reason=self.excerpt(response.reason_phrase),
                    retry_after=response.headers.get("Retry-After"),
                    body=bytes(found),
                )
        except TimeoutError:
            raise ValueError(
                f"expected the whole reply within {timeout_s:g} s (timeout_s)"
            ) from None

    async def events(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        client: httpx2.AsyncClient,
    ) -> AsyncGenerator[str]:
        """The data of each server-sent event, as it comes.

        Raises:
            NoStreamError: an answer that is no stream.
            ValueError: too long a line, or the deadline.
            httpx2.HTTPError: the connection broke.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._sent(client, "POST", path, body) as response,
            ):
                kind = response.headers.get("Content-Type", "")
                if response.status_code >= 300 or "text/event-stream" not in kind:
                    said = bytearray()
                    async for chunk in response.aiter_raw():  # it may never end
                        said += chunk
                        if len(said) > 4 * _EXCERPT:  # as much as an excerpt is of
                            break
                    raise NoStreamError(
                        f"expected a stream, got {response.status_code} "
                        f"{self.message_of(bytes(said))}",
                        status=response.status_code,
                    )
                left = b""
                async for chunk in response.aiter_raw():
                    *lines, left = (left + chunk).split(b"\n")
                    if len(left) > REPLY_BYTES:
                        raise ValueError(f"expected lines of at most {REPLY_BYTES} bytes, got more")
                    for line in lines:
                        if line.startswith(b"data:"):
                            yield line[5:].strip().decode(errors="replace")
        except TimeoutError:
            raise ValueError(f"expected the whole stream within {timeout_s:g} s") from None

    def opened_client(self) -> httpx2.AsyncClient:
        """A client whose connections are kept, for many requests on one event loop."""
        return httpx2.AsyncClient(
            verify=_tls(),
            timeout=None,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def _opened(self, client: httpx2.AsyncClient | None) -> Any:
        return self.opened_client() if client is None else _Kept(client)

    def _sent(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Any:
        headers = {"Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = urllib.parse.urlsplit(self.url)
        url = url._replace(path=url.path.rstrip("/") + path, fragment="").geturl()
        if body is None:
            return client.stream(method, url, headers=headers)
        headers["Content-Type"] = "application/json"
        return client.stream(method, url, content=json.dumps(body), headers=headers)


class _Kept:
    """A client that somebody else closes."""

    def __init__(self, client: httpx2.AsyncClient):
        self._client = client

    async def __aenter__(self) -> httpx2.AsyncClient:
        return self._client

    async def __aexit__(self, *_: object) -> None:
        return None


def listed_models(reply: HttpReply) -> dict[str, Mapping[str, Any]]:
    """What a reply to `/models` says of each model, by name; empty where it is no such list."""
    try:
        found = parse_json(reply.body) if reply.is_ok else None
    except ValueError:
        return {}
    entries = found.get("data") if isinstance(found, Mapping) else None
    entries = entries if isinstance(entries, list) else []
    named = [(one.get("id"), one) for one in entries if isinstance(one, Mapping)]
    return {name: one for name, one in named if isinstance(name, str)}


def run_apart(what: Coroutine[Any, Any, T]) -> T:
    """A coroutine's value, on an event loop in another thread: a notebook's has one already."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, what).result()


def retry_after(header: str | None, *, default: float) -> float:
    """Seconds that a server asks to wait, by a number or a date; ten minutes at most.

    >>> retry_after("7", default=1.0), retry_after("soon", default=1.0)
    (7.0, 1.0)
    """
    if header is None:
        return default
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(header)
            until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
            seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, OverflowError, TypeError):
            return default
    return default if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_WAIT)


def excerpt(text: str) -> str:
    r"""The beginning of a text, on one line, without what steers a terminal.

    >>> excerpt("a\n\x1b[31mb")
    'a ?[31mb'
    """
    text = " ".join(text[: 4 * _EXCERPT].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _check_url(url: str) -> None:
    """Refuses what is no URL of HTTP; what it holds is not echoed but for its host."""
    if _is_url(url):
        return
    shown, advice = redact_url(url), "give it as in http://localhost:8000/v1"
    if "://" not in url and _is_url(f"http://{url}"):
        meant = redact_url(f"http://{url}")
        shown, advice = meant.removeprefix("http://"), f"did you mean {excerpt(meant)}?"
    raise wrong("url", "http://... or https://...", shown, advice)


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_url and text.isprintable() and " " not in text


def _check_key(api_key: object, url: str) -> None:
    if api_key is None:
        return
    if not isinstance(api_key, str) or not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError(
            "api_key: expected visible ASCII characters without spaces, got others (the value is "
            "not shown); a line end, perhaps: set it without"
        )
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ValueError(
            "api_key: expected none where the url has a user and a password, got both; leave out "
            "one of them"
        )
