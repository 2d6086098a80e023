"""LongMemEval: questions about a user's earlier chats (arXiv 2410.10813), at a length of choice.

Reads the published layout, a JSON list (`longmemeval_s.json`, `_m`, `_oracle`, cleaned or not).
Each sample's history is made anew, as the SWAA paper's 16k to 32k version is: all sessions that
hold the answer, others drawn from the same haystack until a number of tokens is reached, in order
of their dates.
"""

import dataclasses
import datetime
import itertools
import logging
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from swaa_jax.eval.tasks.files import FileTask
from swaa_jax.eval.tasks.task import Sample
from swaa_jax.examples import read_example
from swaa_jax.fields import check_fields, integer
from swaa_jax.records import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LongMemEvalTask"]

_log = logging.getLogger(__name__)

_SAME = (
    "The answer must have all that the reference has; more beside it, and the steps that lead "
    "there, do no harm."
)
_GRADING = {
    "single-session-user": _SAME,
    "single-session-assistant": _SAME,
    "multi-session": _SAME,
    "temporal-reasoning": f"{_SAME} A number of days, weeks or months that is one off still counts "
    "as right.",
    "knowledge-update": "The reference is the newest state of things. The answer is right if it "
    "gives that as the present state, even if it tells older states too.",
    "single-session-preference": "The reference describes what an answer made for this user looks "
    "like. The answer is right if it recalls what the user said and makes use of it; it need not "
    "meet every point.",
}
_ABSTENTION = (
    "The chats do not have what is asked for, and the reference says why. The answer is right if "
    "it says that this cannot be known from them; it is wrong if it answers the question."
)
_DATE = re.compile(r"(\d{4})/(\d\d)/(\d\d) \([A-Za-z]{3}\) (\d\d):(\d\d)")
_ROLES = ("user", "assistant", "system")
_TRIES = 8  # sessions that are too long for what is left, before the history is done

_PROMPT = """\
Below are earlier chats between a user and you, oldest first, each with its date. Answer the \
user's question from what was said in them. If they do not have the answer, say so.

{history}

Today is {date}.
Question: {question}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Session:
    id: str
    when: datetime.datetime
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongMemEvalTask(FileTask):
    """LongMemEval (arXiv 2410.10813), with histories of `min_tokens` to `max_tokens`.

    A sample's length is drawn evenly between the two, so that the mean is in the middle (24k), and
    sessions are added while they bring the history nearer to it. It stays far below where the
    haystack has no more sessions (`longmemeval_oracle.json` has only those with the answer).
    Sessions are never cut: where those that hold the answer have more than `max_tokens`, the sample
    has them and nothing else, and its info says `over_budget`.

    Attributes:
        files: a path or several, local or gs://.
        limit: the first so many samples; None: all.
        min_tokens, max_tokens: of a history, by the model's tokenizer.
        seed: of lengths and sessions; a sample's draws depend on nothing else but its id.

    Raises:
        ValueError: a value out of range.

    Examples:
        >>> LongMemEvalTask(files="longmemeval_s.json", min_tokens=8_000, max_tokens=16_000).label
        'longmemeval 8000-16000'
    """

    name: ClassVar[str] = "longmemeval"
    judge: ClassVar[Mapping[str, object]] = {"name": "llm"}
    max_new_tokens: ClassVar[int] = 2000  # the paper's

    min_tokens: int = 16_000
    max_tokens: int = 32_000
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self, min_tokens=integer(least=0), max_tokens=integer(least=1), seed=integer(least=0)
        )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: expected at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )

    @property
    def label(self) -> str:
        """The name, with the range of lengths."""
        return f"{self.name} {self.min_tokens}-{self.max_tokens}"

    def samples(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool) -> list[Sample]:
        """See `Task.samples`."""
        del thinking
        records = itertools.islice(self.records(), self.limit)
        found = [self._sample(record, tokenizer) for record in records]
        over = sum(sample.info["over_budget"] for sample in found)
        short = sum(sample.info["history_tokens"] < self.min_tokens for sample in found)
        if over or short:
            _log.info(
                "%s: %d of %d histories have less than %d tokens; in %d the sessions with the "
                "answer alone have more than %d",
                self.name,
                short,
                len(found),
                self.min_tokens,
                over,
                self.max_tokens,
            )
        return found

    def _sample(self, record: Record, tokenizer: "PreTrainedTokenizerBase") -> Sample:
        question_id, question = record.text("question_id"), record.text("question")
        question_type = record.text("question_type")
        if question_type not in _GRADING:
            raise record.wrong("question_type", f"one of {', '.join(_GRADING)}", question_type)
        abstention = "_abs" in question_id
        date = record.text("question_date")
        _moment(record, "question_date", date)
        sessions = _sessions(record)
        wanted = _answer_sessions(record, sessions, abstention=abstention)
        rng = random.Random(f"{self.seed}/{question_id}")
        target = rng.randint(self.min_tokens, self.max_tokens)
        chosen, tokens = self._choose(sessions, wanted, target, tokenizer, rng)
        history = "\n\n".join(sessions[at].text for at in chosen)
        prompt = _PROMPT.format(history=history, date=date, question=question)
        return Sample(
            id=question_id,
            messages=({"role": "user", "content": prompt},),
            references=read_example(record, shape="question").right_answers,
            question=question,
            kind="abstention" if abstention else question_type,
            grading=_ABSTENTION if abstention else _GRADING[question_type],
            info={
                "question_type": question_type,
                "abstention": abstention,
                "question_date": date,
                "target_tokens": target,
                "history_tokens": tokens,
                "num_sessions": len(chosen),
                "num_answer_sessions": len(wanted),
                "over_budget": tokens > self.max_tokens,
            },
        )

    def _choose(
        self,
        sessions: list[_Session],
        wanted: list[int],
        target: int,
        tokenizer: "PreTrainedTokenizerBase",
        rng: random.Random,
    ) -> tuple[list[int], int]:
        """Indices of the history's sessions by date, and their tokens."""

        def count(at: int) -> int:
            return len(tokenizer(sessions[at].text + "\n\n", add_special_tokens=False)["input_ids"])

        chosen = list(wanted)
        tokens = sum(count(at) for at in wanted)
        others = [at for at in range(len(sessions)) if at not in wanted]
        rng.shuffle(others)
        misses = 0
        for at in others:
            if tokens >= target or misses == _TRIES:
                break
            more = count(at)
            if more < 2 * (target - tokens) and tokens + more <= self.max_tokens:
                chosen.append(at)
                tokens += more
            else:
                misses += 1
        return sorted(chosen, key=lambda at: (sessions[at].when, at)), tokens


def _sessions(record: Record) -> list[_Session]:
    """All sessions of the haystack that are not empty."""
    ids = record.items("haystack_session_ids", str, "texts")
    dates = record.items("haystack_dates", str, "texts")
    sessions = record.items("haystack_sessions", list, "lists of turns")
    for name, values in (("haystack_dates", dates), ("haystack_session_ids", ids)):
        if len(values) != len(sessions):
            raise DataError(
                f"{record.place}: {name}: expected as many as haystack_sessions, {len(sessions)}, "
                f"got {len(values)}"
            )
    found = []
    for at, turns in enumerate(sessions):
        when = _moment(record, f"haystack_dates[{at}]", dates[at])
        lines = [f"### Chat of {dates[at]}"]
        for number, turn in enumerate(turns):
            place = f"haystack_sessions[{at}][{number}]"
            if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
                raise record.wrong(place, f"a turn whose role is one of {', '.join(_ROLES)}", turn)
            if not isinstance(turn.get("content"), str):
                raise record.wrong(f"{place}.content", "a text", turn.get("content"))
            lines.append(f"{turn['role']}: {turn['content'].strip()}")
        if turns:  # some published haystacks have sessions without turns
            text = "\n\n".join(lines)
            found.append(_Session(id=ids[at], when=when, text=text))
    return found


def _answer_sessions(record: Record, sessions: list[_Session], *, abstention: bool) -> list[int]:
    """Indices of the sessions that hold the answer, or what looks like one."""
    ids = record.items("answer_session_ids", str, "texts")
    if not ids and not abstention:
        raise record.wrong("answer_session_ids", "at least one", ids)
    known = {session.id for session in sessions}
    for at, one in enumerate(ids):
        if one not in known:
            raise record.wrong(
                f"answer_session_ids[{at}]", "one of haystack_session_ids, with turns", one
            )
    return [at for at, session in enumerate(sessions) if session.id in ids]


def _moment(record: Record, field: str, text: str) -> datetime.datetime:
    match = _DATE.fullmatch(text.strip())
    try:
        year, month, day, hour, minute = map(int, match.groups() if match else ())
        return datetime.datetime(year, month, day, hour, minute)
    except ValueError:
        raise record.wrong(field, "a date such as 2023/05/30 (Tue) 23:40", text) from None
