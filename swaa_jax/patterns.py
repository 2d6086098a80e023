r"""Regular expressions from files, matched within a limit of time and memory.

Python's engine backtracks: `(a+)+$` takes exponential time on a text that it does not match, and
cannot be stopped from outside. An engine of linear time (RE2) would be another language, without
the lookahead that adapters use and with other ideas of `\w` and `$`. So Python's own runs, in a
process of its own, which is ended when it takes too long.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from swaa_jax.apart import Worker, serve
from swaa_jax.fields import show, wrong
from swaa_jax.limits import PATTERN_BYTES, PATTERN_CHARACTERS, PATTERN_SECONDS

__all__ = ["check_pattern", "find_groups", "is_fullmatch"]

_QUICK_S = 0.1  # a call that takes no longer is not counted


def check_pattern(name: str, value: object, *, advice: str = "") -> str:
    """A regular expression.

    Raises:
        ValueError: it is none, or longer than any in use.
    """
    if not isinstance(value, str):
        raise wrong(name, "a regular expression", value)
    if len(value) > PATTERN_CHARACTERS:
        raise wrong(name, f"a regular expression of at most {PATTERN_CHARACTERS} characters", value)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a later Python will refuse
            re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        reason = show(str(error))[1:-1]
        raise wrong(name, f"a regular expression ({reason})", value, advice) from None
    return value


def is_fullmatch(name: str, expression: str, texts: Sequence[str]) -> bool:
    """Whether the expression matches one of the texts, all of it.

    >>> is_fullmatch("target_modules", r".*[qk]_proj", ["layers.0.q_proj"])
    True

    Raises:
        ValueError: it takes too long, or too much memory.
    """
    return _ask(name, expression, "fullmatch", texts)


def find_groups(name: str, expression: str, text: str) -> list[str | None]:
    r"""The first group of each match in the text; None where it took no part.

    >>> find_groups("pattern", r"= (\d+)", "x = 1, y = 2")
    ['1', '2']

    Raises:
        ValueError: as `is_fullmatch`.
    """
    return _ask(name, expression, "groups", [text])


_WORKER = Worker("swaa_jax.patterns")
_slow: defaultdict[str, float] = defaultdict(float)
"""Seconds of computing that an expression has taken beyond what is usual."""


def _ask(name: str, expression: str, how: str, texts: Sequence[str]) -> Any:
    seconds, reply = PATTERN_SECONDS - _slow[expression], None
    if seconds > 0:
        request = [expression, how, list(texts)]
        reply = _WORKER.ask(request, seconds=seconds, memory=PATTERN_BYTES)
        took = seconds if reply is None else reply.seconds
        if took > _QUICK_S:
            _slow[expression] += took
    if reply is None:
        raise ValueError(
            f"{name}: expected a regular expression that is matched within {PATTERN_SECONDS:g} s "
            f"and {PATTERN_BYTES >> 20} MB, got {show(expression)}, which was not; write it "
            "without repeats in repeats, such as (a+)+"
        )
    return reply.answer


def _match(request: Sequence[Any]) -> bool | list[str | None]:
    """What the child answers."""
    expression, how, texts = request
    compiled = re.compile(expression)
    if how == "fullmatch":
        return any(compiled.fullmatch(text) for text in texts)
    return [match[1] for text in texts for match in compiled.finditer(text)]


if __name__ == "__main__":
    serve(_match)
