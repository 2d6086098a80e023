"""What a judge is: a function of a `Judged` that gives a `Verdict` on its answer."""

import dataclasses
import math
from collections.abc import Callable

from swaa_jax.chats import CLOSING, OPENING
from swaa_jax.fields import number, set_field, wrong

__all__ = ["Answer", "Judge", "Judged", "Verdict", "answer_of", "strip_thinking"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge looks at.

    Attributes:
        question: as the model was asked.
        references: right answers; any of them will do, except for `ruler` and `includes` with
            need="all", which want all.
        response: the generated text.
        thinking: whether the prompt had opened a thought.
        grading: what a language model that judges must know besides the references; rules ignore
            it.

    Examples:
        >>> judged = Judged(question="2 + 2?", references=("4", "four"), response="It is 4.")
        >>> any(reference in judged.response for reference in judged.references)
        True
    """

    question: str
    references: tuple[str, ...]
    response: str
    thinking: bool = False
    grading: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.references, str):
            raise wrong("references", "several texts", self.references, "put it into a tuple")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer counts as right, and what it was decided on.

    Attributes:
        accepted: whether it is right.
        reason: for people.
        score: 0 to 1, where being right has degrees (RULER's: the fraction found); else 1 if it is
            accepted and 0 if not.
        failed: the judge came to no verdict; the answer is left out of scores, and counted.

    Examples:
        >>> Verdict(accepted=True, reason="said 4").score
        1.0
        >>> Verdict(accepted=False, reason="1 of 4 found", score=0.25).score
        0.25
    """

    accepted: bool
    reason: str
    score: float = math.nan
    failed: bool = False

    def __post_init__(self):
        if math.isnan(self.score):
            set_field(self, "score", float(self.accepted))
        number(least=0, most=1)("score", self.score)


Judge = Callable[[Judged], Verdict]
"""Says of an answer whether it is right.

>>> def polite(judged: Judged) -> Verdict:
...     return Verdict(accepted="please" in judged.response, reason="says please")
>>> polite(Judged(question="?", references=("x",), response="x, please")).accepted
True
"""


def answer_of(judged: Judged) -> str | Verdict:
    """The answer without its thinking; the verdict where there is none."""
    if not judged.references:
        raise ValueError("references: expected at least one right answer, got none")
    answer = strip_thinking(judged.response, thinking=judged.thinking)
    if not answer.finished:
        return Verdict(accepted=False, reason="thinking did not end")
    return answer.text or Verdict(accepted=False, reason="no answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A generated text without its thinking.

    Attributes:
        text: what is to be scored; empty when the thinking never ended.
        finished: false when a thought was left open.

    Examples:
        >>> strip_thinking("Let me see.</think>It is 4.")
        Answer(text='It is 4.', finished=True)
    """

    text: str
    finished: bool


def strip_thinking(text: str, *, thinking: bool = False) -> Answer:
    r"""The text after the last thought's end, `</think>` or another of `THOUGHT_MARKERS`.

    Args:
        text: the generated text, with or without the prompt's end.
        thinking: whether the prompt itself had opened a thought, as thinking templates do; then a
            text that does not close it is unfinished.

    Example:
        >>> strip_thinking("a is 1.</think>\n\nIt is 1.").text
        'It is 1.'
        >>> strip_thinking("a is 1, no wait", thinking=True).finished
        False
    """
    ends = [found.end() for found in CLOSING.finditer(text)]
    if ends:
        return _open_or_done(text[ends[-1] :])
    return Answer(text="", finished=False) if thinking else _open_or_done(text)


def _open_or_done(text: str) -> Answer:
    if OPENING.search(text):
        return Answer(text="", finished=False)
    return Answer(text=text.strip(), finished=True)
