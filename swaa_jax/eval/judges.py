"""Who decides whether an answer is right: rules, RULER's score, or a language model over HTTP.

A judge is called with a `Judged` and returns a `Verdict`. Rules see the answer without its
thinking; an answer whose thinking never ended is wrong under all of them.
"""

import dataclasses
import hashlib
import json
import re
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from swaa_jax.eval.scorers import all_or_nothing, strip_thinking
from swaa_jax.typing import PathLike

CHOICE = r"The correct answer is \(?([A-D])"
"""LongBench-v2's official pattern; asterisks are stripped before it is looked for."""

_PROMPT = """\
You grade an answer to a question. It is right if it says the same as the reference answer, in \
whatever words; it is wrong if it says something else, something less, or that it does not know.

Question: {question}

Reference answer: {reference}

Answer to grade: {answer}

Reply with one word, CORRECT or INCORRECT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge looks at.

    Attributes:
        question: as the model was asked.
        references: right answers; any of them will do, except for `ruler`, which wants all.
        response: the generated text.
        thinking: whether the prompt had opened `<think>`.
    """

    question: str
    references: tuple[str, ...]
    response: str
    thinking: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer counts as right, and what it was decided on."""

    accepted: bool
    reason: str


Judge = Callable[[Judged], Verdict]


def _of_rule(rule: Callable[[str, tuple[str, ...]], Verdict]) -> Judge:
    """A judge of answers without their thinking."""

    def judge(judged: Judged) -> Verdict:
        if not judged.references:
            raise ValueError("references: expected at least one right answer, got none")
        answer = strip_thinking(judged.response, thinking=judged.thinking)
        if not answer.finished:
            return Verdict(accepted=False, reason="thinking did not end")
        return rule(answer.text, judged.references)

    return judge


def exact_judge() -> Judge:
    """The answer is a reference, apart from case, spaces, articles and punctuation (SQuAD's rule).

    >>> judge = exact_judge()
    >>> judge(Judged(question="Where?", references=("Paris",), response="The  Paris.")).accepted
    True
    """

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        wanted = {_plain(reference) for reference in references}
        return Verdict(accepted=_plain(answer) in wanted, reason=answer)

    return _of_rule(rule)


def regex_judge(pattern: str = CHOICE, *, which: str = "first") -> Judge:
    """The pattern's first group, where it matches, is a reference.

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
            return Verdict(accepted=False, reason="the pattern is not in the answer")
        said = found[0] if which == "first" else found[-1]
        wanted = {_plain(reference) for reference in references}
        return Verdict(accepted=_plain(said or "") in wanted, reason=f"said {said}")

    return _of_rule(rule)


def ruler_judge() -> Judge:
    """The answer contains every reference (RULER's match, all or nothing as in the paper)."""

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        score = all_or_nothing(answer, references)
        return Verdict(accepted=score == 1.0, reason=f"all {len(references)} found: {score == 1.0}")

    return _of_rule(rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmJudgeConfig:
    """A language model behind an OpenAI-compatible URL.

    Attributes:
        url: of the API, as in `http://localhost:8000/v1`; `/chat/completions` is appended.
        model: its name there.
        api_key: sent as a bearer token; None: no such header.
        prompt: with `{question}`, `{reference}` and `{answer}`.
        max_tokens: of a reply, its thinking included.
        requests_per_minute: at most; None: as fast as it answers.
        attempts: requests for one verdict before it is given up.
        timeout_s: of one request.
        cache: a JSONL file of verdicts on this machine, so that nothing is asked twice.
    """

    url: str
    model: str
    api_key: str | None = None
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
        if self.attempts < 1:
            raise ValueError(f"attempts: expected at least 1, got {self.attempts}")


class LlmJudge:
    """A judge that asks a model; safe to call from several threads.

    Replies are read strictly: the last line must be CORRECT or INCORRECT (thinking and punctuation
    aside). Anything else is asked for again, as are HTTP 408, 409, 429 and 5xx and broken
    connections, each time after twice the pause (or what `Retry-After` says).

    Raises (when called):
        ValueError: the server refuses the request, or gave no verdict in all attempts.
    """

    def __init__(self, config: LlmJudgeConfig, *, pause_s: float = 1.0):
        self._config = config
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._verdicts = self._read_cache()

    def __call__(self, judged: Judged) -> Verdict:
        """The model's verdict, from the cache where it has been asked before."""
        answer = strip_thinking(judged.response, thinking=judged.thinking)
        if not answer.finished:
            return Verdict(accepted=False, reason="thinking did not end")
        prompt = self._config.prompt.format(
            question=judged.question,
            reference=" or ".join(judged.references),
            answer=answer.text,
        )
        key = hashlib.sha256(f"{self._config.model}\0{prompt}".encode()).hexdigest()
        with self._lock:
            known = self._verdicts.get(key)
        if known is None:
            known = self._ask(prompt)
            self._keep(key, known)
        return Verdict(accepted=known, reason=f"{self._config.model}: {_word(known)}")

    def _ask(self, prompt: str) -> bool:
        problem = ""
        for attempt in range(self._config.attempts):
            self._wait_for_turn()
            pause = self._pause_s * 2**attempt
            try:
                reply = self._request(prompt)
            except urllib.error.HTTPError as error:
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ValueError(
                        f"judge: {self._config.url} refused the request: {error.code} "
                        f"{error.reason}; {_excerpt(error.read().decode(errors='replace'))}"
                    ) from None
                problem = f"{error.code} {error.reason}"
                pause = _retry_after(error.headers.get("Retry-After"), pause)
            except (OSError, KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                verdict = read_verdict(reply)
                if verdict is not None:
                    return verdict
                problem = f"expected CORRECT or INCORRECT, got {_excerpt(reply)!r}"
            if attempt + 1 < self._config.attempts:
                time.sleep(pause)
        raise ValueError(
            f"judge: no verdict from {self._config.url} in {self._config.attempts} attempts; the "
            f"last: {problem}. Start it, or pass another url; what was judged so far is kept"
        )

    def _request(self, prompt: str) -> str:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
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
            return json.load(response)["choices"][0]["message"]["content"] or ""

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
        verdicts = {}
        for line in epath.Path(self._config.cache).read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a process that was killed
            verdicts[row["key"]] = row["accepted"]
        return verdicts

    def _keep(self, key: str, accepted: bool) -> None:
        with self._lock:
            self._verdicts[key] = accepted
            if self._config.cache is not None:
                line = json.dumps({"key": key, "accepted": accepted}) + "\n"
                with open(self._config.cache, "a", encoding="utf-8") as file:
                    file.write(line)


def read_verdict(reply: str) -> bool | None:
    """What a judge's reply says; None where it does not say it in the asked-for form.

    >>> read_verdict("<think>hm</think> CORRECT."), read_verdict("It is correct, mostly")
    (True, None)
    """
    lines = strip_thinking(reply).text.splitlines()
    word = lines[-1].strip(string.punctuation + string.whitespace) if lines else ""
    return {"CORRECT": True, "INCORRECT": False}.get(word)


JUDGES: Mapping[str, Callable[..., Judge]] = {
    "exact": exact_judge,
    "regex": regex_judge,
    "ruler": ruler_judge,
    "llm": lambda **settings: LlmJudge(LlmJudgeConfig(**settings)),
}


def make_judge(name: str, **settings: Any) -> Judge:
    """The judge of that name.

    Args:
        name: "exact", "regex", "ruler" or "llm".
        settings: of :func:`regex_judge`, or fields of :class:`LlmJudgeConfig`.

    Raises:
        ValueError: no such judge, or settings that it does not have.
    """
    if name not in JUDGES:
        raise ValueError(f"judge: expected one of {', '.join(JUDGES)}, got {name!r}")
    try:
        return JUDGES[name](**settings)
    except TypeError as error:
        raise ValueError(f"judge {name!r}: {error}") from None


def _plain(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def _word(accepted: bool) -> str:
    return "CORRECT" if accepted else "INCORRECT"


def _excerpt(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."


def _retry_after(header: str | None, default: float) -> float:
    """Seconds that the server asks to wait, where it gives a number."""
    try:
        return default if header is None else float(header)
    except ValueError:
        return default
