"""A language model that judges, behind an OpenAI-compatible URL."""

import dataclasses
import datetime
import email.utils
import hashlib
import http.client
import json
import math
import os
import re
import string
import threading
import time
import urllib.error
import urllib.request

from etils import epath

from swaa_jax import storage
from swaa_jax.eval.judging.judge import Judged, Verdict, answer_of, strip_thinking
from swaa_jax.fields import check_fields, integer, number, or_none, text, wrong
from swaa_jax.typing import PathLike

_EXCERPT = 200
_PROMPT = """\
You grade an answer to a question. It is right if it says the same as the reference answer, in \
whatever words; it is wrong if it says something else, something less, or that it does not know. \
Where there is a note on grading, the note decides.

Question: {question}

Reference answer: {reference}

Answer to grade: {answer}

Reply with one word, CORRECT or INCORRECT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmJudgeConfig:
    """A language model behind an OpenAI-compatible URL.

    Attributes:
        url: of the API, as in `http://localhost:8000/v1`; `/chat/completions` is appended.
        model: its name there.
        api_key: sent as a bearer token; None: no such header.
        prompt: with `{question}`, `{reference}` and `{answer}`; a note on grading, where a sample
            has one, follows the reference.
        max_tokens: of a reply, its thinking included.
        requests_per_minute: at most; None: as fast as it answers.
        attempts: requests for one verdict before it is given up.
        timeout_s: of one request.
        cache: a JSONL file of verdicts on this machine, so that nothing is asked twice.

    Raises:
        ValueError: a value out of range, or a prompt that lacks one of the three.
    """

    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    prompt: str = _PROMPT
    max_tokens: int = 2048
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
            max_tokens=integer(least=1),
            requests_per_minute=or_none(number(above=0)),
            attempts=integer(least=1),
            timeout_s=number(above=0),
        )
        if not self.url.startswith(("http://", "https://")):
            raise wrong("url", "http://... or https://...", self.url)
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

    Replies are read strictly, see :func:`read_verdict`. A reply that is not a verdict is asked for
    again, at temperature 1 in place of 0. A request is also repeated after HTTP 408, 409, 429 and
    5xx, a broken or silent connection, and a body that is not a chat completion, each time after
    twice the pause (or what `Retry-After` says, ten minutes at most).

    Raises (when called):
        ValueError: the server refuses the request, or gave no verdict in all attempts.
    """

    def __init__(self, config: LlmJudgeConfig, *, pause_s: float = 1.0):
        self._config = config
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._asking: dict[str, threading.Lock] = {}
        self._torn = False  # the cache's last line has no end
        self._verdicts = self._read_cache()

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
                self._keep(key, known)
        return Verdict(accepted=known, reason=f"{self._config.model}: {_word(known)}")

    def _ask(self, prompt: str) -> bool:
        problem, temperature = "", 0.0
        for attempt in range(self._config.attempts):
            self._wait_for_turn()
            pause = self._pause_s * 2**attempt
            try:
                reply = _content(self._request(prompt, temperature))
            except urllib.error.HTTPError as error:
                with error:
                    said = _body_of(error)
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ValueError(
                        f"judge: {self._config.url} refused the request: {error.code} "
                        f"{error.reason}; {said}"
                    ) from None
                problem = f"{error.code} {error.reason}"
                pause = retry_after(error.headers.get("Retry-After"), default=pause)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                verdict = read_verdict(reply)
                if verdict is not None:
                    return verdict
                problem = f"expected CORRECT or INCORRECT, got {_excerpt(reply)!r}"
                temperature = 1.0  # at 0 it would say the same again
            if attempt + 1 < self._config.attempts:
                time.sleep(pause)
        raise ValueError(
            f"judge: no verdict from {self._config.url} in {self._config.attempts} attempts; the "
            f"last: {problem}. Start it, or pass another url; what was judged so far is kept"
        )

    def _request(self, prompt: str, temperature: float) -> bytes:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": self._config.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self._config.api_key is not None:
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        request = urllib.request.Request(
            self._config.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
        )
        with urllib.request.urlopen(request, timeout=self._config.timeout_s) as response:
            return response.read()

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
                row = json.loads(line)
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
        except ValueError:
            return default
        until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
        seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    return default if math.isnan(seconds) else min(max(seconds, 0.0), 600.0)


def _content(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        content = 0
    if content is not None and not isinstance(content, str):
        got = _excerpt(body.decode(errors="replace"))
        raise ValueError(f"expected a chat completion in JSON, got {got!r}")
    return content or ""


def _body_of(error: urllib.error.HTTPError) -> str:
    try:
        return _excerpt(error.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return "and broke off"


def _word(accepted: bool) -> str:
    return "CORRECT" if accepted else "INCORRECT"


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."
