"""Who decides whether an answer is right: rules, RULER's score, or a language model over HTTP.

A judge is called with a `Judged` and returns a `Verdict`. Rules see the answer without its
thinking; an answer whose thinking never ended is wrong under all of them.
"""

import dataclasses
import datetime
import email.utils
import hashlib
import http.client
import json
import math
import re
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from swaa_jax.eval.judging.scorers import includes, plain, string_match_all, strip_thinking
from swaa_jax.typing import PathLike

CHOICE = r"The correct answer is \(?([A-D])"
"""LongBench-v2's official pattern; asterisks are stripped before it is looked for."""

_PROMPT = """\
You grade an answer to a question. It is right if it says the same as the reference answer, in \
whatever words; it is wrong if it says something else, something less, or that it does not know. \
Where there is a note on grading, the note decides.

Question: {question}

Reference answer: {reference}

Answer to grade: {answer}

Reply with one word, CORRECT or INCORRECT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge looks at.

    Attributes:
        question: as the model was asked.
        references: right answers; any of them will do, except for `ruler` and `includes` with
            need="all", which want all.
        response: the generated text.
        thinking: whether the prompt had opened `<think>`.
        grading: what a language model that judges must know beside the references; rules ignore it.
    """

    question: str
    references: tuple[str, ...]
    response: str
    thinking: bool = False
    grading: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer counts as right, and what it was decided on.

    Attributes:
        accepted: whether it is right.
        reason: for people.
        score: 0 to 1, where being right has degrees (RULER's: the fraction found); else 1 if it is
            accepted and 0 if not.
    """

    accepted: bool
    reason: str
    score: float = math.nan

    def __post_init__(self):
        if math.isnan(self.score):
            object.__setattr__(self, "score", float(self.accepted))
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"score: expected 0 to 1, got {self.score}")


Judge = Callable[[Judged], Verdict]


def _of_rule(rule: Callable[[str, tuple[str, ...]], Verdict]) -> Judge:
    """A judge of answers without their thinking."""

    def judge(judged: Judged) -> Verdict:
        answer = _answer_of(judged)
        return answer if isinstance(answer, Verdict) else rule(answer, judged.references)

    return judge


def _answer_of(judged: Judged) -> str | Verdict:
    """The answer without its thinking; the verdict where there is none."""
    if not judged.references:
        raise ValueError("references: expected at least one right answer, got none")
    answer = strip_thinking(judged.response, thinking=judged.thinking)
    if not answer.finished:
        return Verdict(accepted=False, reason="thinking did not end")
    return answer.text or Verdict(accepted=False, reason="no answer")


def exact_judge() -> Judge:
    """The answer is a reference, apart from case, spaces, articles and punctuation (SQuAD's rule),
    Unicode's spellings of one character (NFKC) and thousands separators.

    >>> judge = exact_judge()
    >>> judge(Judged(question="Where?", references=("Paris",), response="The  Paris.")).accepted
    True
    """

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        wanted = {plain(reference) for reference in references}
        return Verdict(accepted=plain(answer) in wanted, reason=answer)

    return _of_rule(rule)


def includes_judge(*, need: str = "any") -> Judge:
    """The answer has a reference in it, as words or numbers of their own: see
    :func:`swaa_jax.eval.judging.scorers.includes`.

    Args:
        need: "any" of the references, or "all"; the score is then the fraction found.

    Raises:
        ValueError: `need` is another word.

    >>> judge = includes_judge()
    >>> judge(Judged(question="?", references=("12",), response="There are **12**.")).accepted
    True
    """
    if need not in ("any", "all"):
        raise ValueError(f'need: expected "any" or "all", got {need!r}')

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        found = [reference for reference in references if includes(answer, reference)]
        reason = f"has {', '.join(found) or 'none of the references'}"
        if need == "any":
            return Verdict(accepted=bool(found), reason=reason)
        score = len(found) / len(references)
        return Verdict(accepted=score == 1.0, reason=reason, score=score)

    return _of_rule(rule)


def regex_judge(pattern: str = CHOICE, *, which: str = "first") -> Judge:
    """The pattern's first group, where it matches, is a reference.

    Only `pattern` is a regular expression. References are plain text, compared as `exact_judge`
    does, so "C++" and "(7" are good ones.

    Args:
        pattern: a regular expression with one group; asterisks (Markdown) are cut from the answer.
        which: "first" match (LongBench-v2's own rule) or "last".

    Raises:
        ValueError: not a regular expression with a group, or `which` is another word.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern: expected a regular expression, got {pattern!r}: {error}"
        ) from None
    if compiled.groups < 1:
        raise ValueError(f"pattern: expected a group, as in 'answer is (.*)', got {pattern!r}")
    if which not in ("first", "last"):
        raise ValueError(f'which: expected "first" or "last", got {which!r}')

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        found = [match[1] for match in compiled.finditer(answer.replace("*", ""))]
        if not found:
            return Verdict(accepted=False, reason=f"the answer has no match of {pattern!r}")
        said = found[0] if which == "first" else found[-1]
        wanted = {plain(reference) for reference in references}
        return Verdict(accepted=bool(said) and plain(said) in wanted, reason=f"said {said}")

    return _of_rule(rule)


def ruler_judge() -> Judge:
    """The answer contains every reference: RULER's match, all or nothing as in the paper. The score
    is RULER's own, the fraction found.
    """

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        score = string_match_all(answer, references)
        found = round(score * len(references))
        return Verdict(
            accepted=score == 1.0, reason=f"{found} of {len(references)} found", score=score
        )

    return _of_rule(rule)


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
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://... or https://..., got {self.url!r}")
        missing = [n for n in ("question", "reference", "answer") if f"{{{n}}}" not in self.prompt]
        if missing:
            raise ValueError(
                f"prompt: expected {{question}}, {{reference}} and {{answer}} in it, "
                f"got none of {', '.join(missing)}"
            )
        for name in ("attempts", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("requests_per_minute", "timeout_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.cache is not None and "://" in str(self.cache):
            raise ValueError(f"cache: expected a file on this machine, got {self.cache}")


class LlmJudge:
    """A judge that asks a model; safe to call from several threads.

    Replies are read strictly, see :func:`read_verdict`. What is no verdict is asked for again, at
    temperature 1 in place of 0; so are HTTP 408, 409, 429 and 5xx, broken or silent connections and
    bodies that are no chat completion, each time after twice the pause (or what `Retry-After` says,
    ten minutes at most).

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
        answer = _answer_of(judged)
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


def _llm_judge(**settings: Any) -> Judge:
    missing = [name for name in ("url", "model") if settings.get(name) is None]
    if missing:
        raise ValueError(
            f"judge 'llm': expected url (of an OpenAI-compatible API) and model, got no "
            f"{' and no '.join(missing)}"
        )
    return LlmJudge(LlmJudgeConfig(**settings))


JUDGES: Mapping[str, Callable[..., Judge]] = {
    "exact": exact_judge,
    "includes": includes_judge,
    "regex": regex_judge,
    "ruler": ruler_judge,
    "llm": _llm_judge,
}


def make_judge(name: str, **settings: Any) -> Judge:
    """The judge of that name.

    Args:
        name: "exact", "includes", "regex", "ruler" or "llm".
        settings: of :func:`includes_judge` or :func:`regex_judge`, or fields of
            :class:`LlmJudgeConfig`.

    Raises:
        ValueError: no such judge, or settings that it does not have.
    """
    if name not in JUDGES:
        raise ValueError(f"judge: expected one of {', '.join(JUDGES)}, got {name!r}")
    try:
        return JUDGES[name](**settings)
    except TypeError as error:
        raise ValueError(f"judge {name!r}: {error}") from None


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


def _excerpt(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."
