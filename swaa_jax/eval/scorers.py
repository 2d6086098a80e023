"""Scores of generated text against references."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_THINK_END = "</think>"
_THINK_START = "<think>"
_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The fraction of `references` that `prediction` contains, case-insensitive.

    RULER's official score of the needle tasks (`string_match_all`), for one sample and in 0..1; a
    data set's score is the mean over samples.

    Raises:
        ValueError: if there are no references.

    Example:
        >>> string_match_all("They are 12 and 34.", ["12", "56"])
        0.5
    """
    if not references:
        raise ValueError("references: expected at least one string; got none")
    haystack = _normalize(prediction)
    return sum(_normalize(reference) in haystack for reference in references) / len(references)


def all_or_nothing(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` contains every reference, else 0.0: the score of the SWAA paper's Table
    1.

    Example:
        >>> all_or_nothing("12 and 34", ["12", "34"]), all_or_nothing("12", ["12", "34"])
        (1.0, 0.0)
    """
    return float(string_match_all(prediction, references) == 1.0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A generated text without its thinking.

    Attributes:
        text: what is to be scored; empty when the thinking never ended.
        finished: false when a `<think>` was left open.
    """

    text: str
    finished: bool


def strip_thinking(text: str, *, thinking: bool = False) -> Answer:
    r"""The text after the last `</think>`.

    Args:
        text: the generated text, with or without the prompt's end.
        thinking: whether the prompt itself had opened `<think>`, as thinking templates do; then a
            text without `</think>` is unfinished.

    Example:
        >>> strip_thinking("a is 1.</think>\n\nIt is 1.").text
        'It is 1.'
        >>> strip_thinking("a is 1, no wait", thinking=True).finished
        False
    """
    _, end, tail = text.rpartition(_THINK_END)
    if end:
        return _open_or_done(tail)
    return Answer(text="", finished=False) if thinking else _open_or_done(text)


def _open_or_done(text: str) -> Answer:
    if _THINK_START in text:
        return Answer(text="", finished=False)
    return Answer(text=text.strip(), finished=True)


def _normalize(text: str) -> str:
    # RULER's evaluator turns control characters into line breaks before it compares.
    return _CONTROL.sub("\n", text).strip().lower()
