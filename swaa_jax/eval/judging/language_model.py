"""A language model that judges, behind an OpenAI-compatible URL."""

import dataclasses
import hashlib
import json
import os
import re
import string
import threading
import time
from typing import Any

from etils import epath

from swaa_jax import storage
from swaa_jax.documents import parse_json
from swaa_jax.eval.judging.judge import Judged, Verdict, answer_of, strip_thinking
from swaa_jax.fields import check_fields, integer, number, or_none, text, wrong
from swaa_jax.remote import BROKEN, Endpoint, Reply, retry_after
from swaa_jax.typing import PathLike

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
        timeout_s: seconds of one request, from the connection to the reply's last byte.
        cache: a JSONL file of verdicts on this machine, so that nothing is asked twice.

    Raises:
        ValueError: a value out of range, or a prompt that lacks one of the three.

    Examples:
        >>> config = LlmJudgeConfig(url="http://localhost:8000/v1", model="judge", timeout_s=60)
        >>> config.endpoint.shown
        'http://localhost:8000/v1'
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
        _ = self.endpoint  # is checked
        missing = [n for n in ("question", "reference", "answer") if f"{{{n}}}" not in self.prompt]
        if missing:
            raise ValueError(
                f"prompt: expected {{question}}, {{reference}} and {{answer}} in it, "
                f"got none of {', '.join(missing)}"
            )
        if self.cache is not None and not storage.is_local(self.cache):
            raise wrong("cache", "a file on this machine", os.fspath(self.cache))

    @property
    def endpoint(self) -> Endpoint:
        """Where it is asked."""
        return Endpoint(url=self.url, api_key=self.api_key)


class LlmJudge:
    """A judge that asks a model over OpenAI's API; safe to call from several threads.

    Replies are read strictly, see :func:`read_verdict`. What is no verdict is asked for again, at
    temperature 1; so are HTTP 408, 409, 429 and 5xx, broken or silent connections and bodies that
    are no chat completion, each time after twice the pause (or what `Retry-After` says, ten minutes
    at most). Where the replies to all attempts are no verdict, the verdict says that it failed; so
    it does where a server that has answered others refuses this one (HTTP 400, 413 and 422: too
    long for it, filtered).
    Redirects are refused: they would take the key, and the verdict, elsewhere.

    Raises (when called):
        ValueError: the server refuses the request, or could not be talked to in all attempts.

    Examples:
        >>> judge = LlmJudge(LlmJudgeConfig(url="http://localhost:8000/v1", model="judge"))
        >>> judge(Judged(question="1 + 1?", references=("2",), response="<think>Well")).reason
        'thinking did not end'
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
        self._endpoint = config.endpoint

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
                if not reply.is_ok and not reply.is_worth_another_try:
                    raise self._refusal(reply)
                if not reply.is_ok:
                    problem = f"{reply.status} {reply.reason}"
                    pause = retry_after(reply.retry_after, default=pause)
                else:
                    said = _content(reply.body)
                    self._answered = True
                    verdict = read_verdict(said)
                    if verdict is not None:
                        return verdict
                    unreadable = True
                    problem = f"expected CORRECT or INCORRECT, got {self._endpoint.excerpt(said)!r}"
                    if temperature is not None:
                        temperature = 1.0  # at 0 it would say the same again
            except _RefusedError:
                raise
            except BROKEN as error:
                problem = self._endpoint.excerpt(f"{type(error).__name__}: {error}")
            if attempt + 1 < self._config.attempts:
                time.sleep(pause)
        if unreadable:
            reason = f"{self._config.model}: no verdict in {self._config.attempts} attempts; the "
            return Verdict(accepted=False, failed=True, reason=f"{reason}last: {problem}")
        raise ValueError(
            f"judge: no verdict from {self._endpoint.shown} in {self._config.attempts} attempts; "
            f"the last: {problem}. Start it, or pass another url; what was judged so far is kept"
        )

    def _refusal(self, reply: Reply) -> "_RefusedError":
        advice = ""
        if reply.status < 400:
            advice = (
                "; redirects are not followed, since they would take the key elsewhere: give the "
                "url that it leads to, if you trust it"
            )
        return _RefusedError(
            f"judge: {self._endpoint.shown} refused the request: {reply.status} {reply.reason}; "
            f"{self._endpoint.excerpt(reply.body.decode(errors='replace'))}{advice}"
        )

    def _request(self, prompt: str, temperature: float | None) -> Reply:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if temperature is not None:
            body["temperature"] = temperature
        if self._config.max_tokens is not None:
            body["max_tokens"] = self._config.max_tokens
        return self._endpoint.post("/chat/completions", body, timeout_s=self._config.timeout_s)

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
