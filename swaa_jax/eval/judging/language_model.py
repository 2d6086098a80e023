"""A language model that judges, behind an OpenAI-compatible URL."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import datetime
import email.utils
import hashlib
import json
import logging
import math
import os
import re
import string
import threading
import time
import urllib.parse
from typing import Any

import httpx2
from etils import epath

from swaa_jax import storage
from swaa_jax.documents import parse_json
from swaa_jax.eval.judging.judge import Judged, Verdict, answer_of, strip_thinking
from swaa_jax.fields import check_fields, integer, number, or_none, text, wrong
from swaa_jax.limits import JUDGE_BYTES
from swaa_jax.redact import redact, redact_url
from swaa_jax.typing import PathLike

_PROMPT = """\
You grade an answer to a question. It is right if it says the same as the reference answer, in \
whatever words; it is wrong if it says something else, something less, or that it does not know. \
Where there is a note on grading, the note decides.

Question: {question}

Reference answer: {reference}

Answer to grade: {answer}

Reply with one word, CORRECT or INCORRECT."""


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


# It logs every request with the whole URL.
logging.getLogger("httpx2").addFilter(_without_secrets)

_EXCERPT = 200  # characters of a reply in messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmJudgeConfig:
    """A language model behind an OpenAI-compatible URL.

    Attributes:
        url: of the API, as in `http://localhost:8000/v1`; `/chat/completions` is appended to its
            path. A password or a query in it is never shown.
        model: its name there.
        api_key: sent as a bearer token, and never shown; None: no such header.
        prompt: with `{question}`, `{reference}` and `{answer}`; a note on grading, where a sample
            has one, follows the reference.
        max_tokens: of a reply, its thinking included; None: not sent (some models refuse it).
        temperature: of the first attempt; replies that are no verdict are drawn anew at 1. None:
            never sent, for models that have one temperature only.
        requests_per_minute: at most; None: as fast as it answers.
        attempts: requests for one verdict before it is given up.
        timeout_s: of one request, from the connection to the reply's last byte.
        cache: a JSONL file of verdicts on this machine, so that nothing is asked twice.

    Raises:
        ValueError: a value out of range, or a prompt that lacks one of the three.
    """

    url: str = dataclasses.field(repr=False)
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    prompt: str = _PROMPT
    max_tokens: int | None = 2048
    temperature: float | None = 0.0
    requests_per_minute: float | None = None
    attempts: int = 5
    timeout_s: float = 120.0
    cache: PathLike | None = None

    def __post_init__(self):
        check_fields(
            self,
            url=text,
            model=text,
            prompt=text,
            max_tokens=or_none(integer(least=1)),
            temperature=or_none(number(least=0)),
            requests_per_minute=or_none(number(above=0)),
            attempts=integer(least=1),
            timeout_s=number(above=0),
        )
        _check_url(self.url)
        _check_key(self.api_key, self.url)
        missing = [n for n in ("question", "reference", "answer") if f"{{{n}}}" not in self.prompt]
        if missing:
            raise ValueError(
                f"prompt: expected {{question}}, {{reference}} and {{answer}} in it, "
                f"got none of {', '.join(missing)}"
            )
        if self.cache is not None and not storage.is_local(self.cache):
            raise wrong("cache", "a file on this machine", os.fspath(self.cache))


class LlmJudge:
    """A judge that asks a model; safe to call from several threads.

    Replies are read strictly, see :func:`read_verdict`. What is no verdict is asked for again, at
    temperature 1; so are HTTP 408, 409, 429 and 5xx, broken or silent connections and bodies that
    are no chat completion, each time after twice the pause (or what `Retry-After` says, ten minutes
    at most). Where the replies to all attempts are no verdict, the verdict says that it failed; so
    it does where a server that has answered others refuses this one (HTTP 400, 413 and 422: too
    long for it, filtered).
    Redirects are refused: they would take the key, and the verdict, elsewhere.

    Raises (when called):
        ValueError: the server refuses the request, or could not be talked to in all attempts.
    """

    def __init__(self, config: LlmJudgeConfig, *, pause_s: float = 1.0):
        self._config = config
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._asking: dict[str, threading.Lock] = {}
        self._answered = False  # it takes our requests; what it refuses now, it refuses for itself
        self._torn = False  # the cache's last line has no end
        self._verdicts = self._read_cache()
        self._shown_url = redact_url(config.url)
        self._secrets = _secrets(config)
        self._ssl = httpx2.create_ssl_context()

    def __call__(self, judged: Judged) -> Verdict:
        """The model's verdict, from the cache where it has been asked before."""
        answer = answer_of(judged)
        if isinstance(answer, Verdict):
            return answer
        reference = " or ".join(judged.references)
        if judged.grading:
            reference += f"\n\nNote on grading: {judged.grading}"
        parts = {"question": judged.question, "reference": reference, "answer": answer}
        prompt = re.sub(
            r"\{(question|reference|answer)\}", lambda name: parts[name[1]], self._config.prompt
        )
        asked = f"{self._config.url}\0{self._config.model}\0{prompt}".encode(errors="surrogatepass")
        key = hashlib.sha256(asked).hexdigest()
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:  # a second thread with the same question waits for the first one's verdict
            known = self._verdicts.get(key)
            if known is None:
                known = self._ask(prompt)
                if isinstance(known, Verdict):
                    return known
                self._keep(key, known)
        return Verdict(accepted=known, reason=f"{self._config.model}: {_word(known)}")

    def _ask(self, prompt: str) -> bool | Verdict:
        """Whether the answer is right; a verdict where no reply said so."""
        problem, unreadable, temperature = "", False, self._config.temperature
        for attempt in range(self._config.attempts):
            self._wait_for_turn()
            pause = self._pause_s * 2**attempt
            unreadable = False
            try:
                reply = self._request(prompt, temperature)
                if reply.status in (400, 413, 422) and self._answered:
                    return Verdict(accepted=False, failed=True, reason=str(self._refusal(reply)))
                if reply.status not in (408, 409, 429) and 300 <= reply.status < 500:
                    raise self._refusal(reply)
                if reply.status >= 300:
                    problem = f"{reply.status} {reply.reason}"
                    pause = retry_after(reply.retry_after, default=pause)
                else:
                    said = _content(reply.body)
                    self._answered = True
                    verdict = read_verdict(said)
                    if verdict is not None:
                        return verdict
                    unreadable = True
                    problem = f"expected CORRECT or INCORRECT, got {self._excerpt(said)!r}"
                    if temperature is not None:
                        temperature = 1.0  # at 0 it would say the same again
            except _RefusedError:
                raise
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
                problem = self._excerpt(f"{type(error).__name__}: {error}")
            if attempt + 1 < self._config.attempts:
                time.sleep(pause)
        if unreadable:
            reason = f"{self._config.model}: no verdict in {self._config.attempts} attempts; the "
            return Verdict(accepted=False, failed=True, reason=f"{reason}last: {problem}")
        raise ValueError(
            f"judge: no verdict from {self._shown_url} in {self._config.attempts} attempts; the "
            f"last: {problem}. Start it, or pass another url; what was judged so far is kept"
        )

    def _refusal(self, reply: "_Reply") -> "_RefusedError":
        advice = ""
        if reply.status < 400:
            advice = (
                "; redirects are not followed, since they would take the key elsewhere: give the "
                "url that it leads to, if you trust it"
            )
        return _RefusedError(
            f"judge: {self._shown_url} refused the request: {reply.status} {reply.reason}; "
            f"{self._excerpt(reply.body.decode(errors='replace'))}{advice}"
        )

    def _excerpt(self, text: str) -> str:
        """A part of what a server said, or of an error, without our secrets."""
        return _excerpt(redact(text, self._secrets))

    def _request(self, prompt: str, temperature: float | None) -> "_Reply":
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if temperature is not None:
            body["temperature"] = temperature
        if self._config.max_tokens is not None:
            body["max_tokens"] = self._config.max_tokens
        # In a thread of its own: a notebook's has an event loop already.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self._post(json.dumps(body))).result()

    async def _post(self, body: str) -> "_Reply":
        """The reply, in full within the deadline and the limit of bytes.

        Raises:
            ValueError: beyond the limit, or the deadline.
            httpx2.HTTPError: the connection broke.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._config.api_key is not None:
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        url = urllib.parse.urlsplit(self._config.url)
        url = url._replace(path=url.path.rstrip("/") + "/chat/completions", fragment="")
        try:
            async with (
                asyncio.timeout(self._config.timeout_s),
                httpx2.AsyncClient(
                    verify=self._ssl, timeout=None, follow_redirects=False
                ) as client,
                client.stream("POST", url.geturl(), content=body, headers=headers) as response,
            ):
                found = b""
                async for chunk in response.aiter_raw():
                    found += chunk
                    if len(found) > JUDGE_BYTES:
                        raise ValueError(
                            f"expected a reply of at most {JUDGE_BYTES} bytes, got more"
                        )
                return _Reply(
                    status=response.status_code,
                    reason=self._excerpt(response.reason_phrase),
                    retry_after=response.headers.get("Retry-After"),
                    body=found,
                )
        except TimeoutError:
            raise ValueError(
                f"expected the whole reply within {self._config.timeout_s:g} s (timeout_s)"
            ) from None

    def _wait_for_turn(self) -> None:
        rate = self._config.requests_per_minute
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next_at)
            self._next_at = at + 60.0 / rate
        time.sleep(at - now)

    def _read_cache(self) -> dict[str, bool]:
        if self._config.cache is None or not epath.Path(self._config.cache).exists():
            return {}
        text = epath.Path(self._config.cache).read_bytes().decode(errors="replace")
        self._torn = not text.endswith("\n") and bool(text)  # of a process that was killed
        verdicts = {}
        for line in text.splitlines():
            try:
                row = parse_json(line)
                key, accepted = row["key"], row["accepted"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(key, str) and isinstance(accepted, bool):
                verdicts[key] = accepted
        return verdicts

    def _keep(self, key: str, accepted: bool) -> None:
        with self._lock:
            self._verdicts[key] = accepted
            if self._config.cache is not None:
                line = json.dumps({"key": key, "accepted": accepted}) + "\n"
                with open(self._config.cache, "a", encoding="utf-8") as file:
                    file.write("\n" + line if self._torn else line)
                self._torn = False


class _RefusedError(ValueError):
    """The server will say the same again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reply:
    """What a server said."""

    status: int
    reason: str
    retry_after: str | None
    body: bytes


def _check_url(url: str) -> None:
    """Refuses what is no URL of HTTP; what it holds is not echoed but for its host."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not url.isprintable() or " " in url:
        raise wrong("url", "http://... or https://...", redact_url(url))


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


def _secrets(config: LlmJudgeConfig) -> list[str]:
    """All that must not be shown, in the forms in which a server may echo it."""
    parts = urllib.parse.urlsplit(config.url)
    user = parts.netloc.rpartition("@")[0]
    found = [config.api_key or "", user, urllib.parse.unquote(parts.password or "")]
    found += [parts.password or "", base64.b64encode(urllib.parse.unquote(user).encode()).decode()]
    for part in parts.query.split("&"):  # a value, or all of a part that has no name
        value = part.partition("=")[2] if "=" in part else part
        found += [value, urllib.parse.unquote(value), urllib.parse.unquote_plus(value)]
    return [secret for secret in found if secret]


def read_verdict(reply: str) -> bool | None:
    """What a judge's reply says; None where it does not say it in the asked-for form.

    The last line must be the one word, its thinking, case and punctuation aside, and the other word
    must not be anywhere in capitals.

    >>> read_verdict("<think>hm</think> CORRECT."), read_verdict("It is correct, mostly")
    (True, None)
    """
    text = strip_thinking(reply).text
    words = set(re.findall(r"\b(?:IN)?CORRECT\b", text))
    last = text.splitlines()[-1].strip(string.punctuation + string.whitespace) if text else ""
    if last.upper() not in ("CORRECT", "INCORRECT") or words - {last.upper()}:
        return None
    return last.upper() == "CORRECT"


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
    return default if math.isnan(seconds) else min(max(seconds, 0.0), 600.0)


def _content(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = parse_json(body.decode())["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        content = 0
    if content is not None and not isinstance(content, str):
        said = body.decode(errors="replace")  # cut by who shows it, behind secrets
        raise ValueError(f"expected a chat completion in JSON, got {said!r}")
    return content or ""


def _word(accepted: bool) -> str:
    return "CORRECT" if accepted else "INCORRECT"


def _excerpt(text: str) -> str:
    text = " ".join(text[: 4 * _EXCERPT].split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."
