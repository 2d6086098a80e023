"""Judges that are rules. They see an answer without its thinking; an empty one is wrong."""

import re
from collections.abc import Callable, Sequence

from swaa_jax.eval.judging.judge import Judge, Judged, Verdict, answer_of
from swaa_jax.eval.judging.scores import includes, plain, string_match_all
from swaa_jax.fields import list_of, one_of, show, text, wrong
from swaa_jax.patterns import check_pattern, find_groups

__all__ = ["CHOICES", "exact_judge", "includes_judge", "regex_judge", "ruler_judge"]

CHOICES = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")
"""LongBench v2's official patterns, in their order; asterisks are cut from the answer before."""

_SHOWN = 3


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
    :func:`swaa_jax.eval.judging.scores.includes`.

    Args:
        need: "any" of the references, or "all"; the score is then the fraction found.

    Raises:
        ValueError: `need` is another word.

    >>> judge = includes_judge()
    >>> judge(Judged(question="?", references=("12",), response="There are **12**.")).accepted
    True
    """
    one_of("any", "all")("need", need)

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        found = [reference for reference in references if includes(answer, reference)]
        reason = f"has {', '.join(found) or 'none of the references'}"
        if need == "any":
            return Verdict(accepted=bool(found), reason=reason)
        score = len(found) / len(references)
        return Verdict(accepted=score == 1.0, reason=reason, score=score)

    return _of_rule(rule)


def regex_judge(pattern: str | Sequence[str] = CHOICES, *, which: str = "first") -> Judge:
    """The pattern's first group, where it matches, is a reference.

    Only `pattern` is a regular expression. References are plain text, compared as `exact_judge`
    does, so "C++" and "(7" are good ones.

    Args:
        pattern: a regular expression with a group, or several in order: the first one that matches
            anywhere decides. Asterisks (Markdown) are cut from the answer.
        which: "first" match (LongBench-v2's own rule) or "last", of the pattern that decides.

    Raises:
        ValueError: not a regular expression with a group, or `which` is another word. When called:
            a pattern that takes too long on an answer (`swaa_jax.patterns`).
    """
    patterns = (pattern,) if isinstance(pattern, str) else list_of(text)("pattern", pattern)
    names = [
        "pattern" if isinstance(pattern, str) else f"pattern[{at}]" for at in range(len(patterns))
    ]
    if not patterns:
        raise wrong("pattern", "a regular expression, or a list of them", pattern)
    for name, one in zip(names, patterns, strict=True):
        if re.compile(check_pattern(name, one)).groups < 1:
            raise wrong(name, "a group, as in 'answer is (.*)'", one)
    one_of("first", "last")("which", which)

    def rule(answer: str, references: tuple[str, ...]) -> Verdict:
        plain_answer = answer.replace("*", "")
        for name, one in zip(names, patterns, strict=True):
            if found := find_groups(name, one, plain_answer):
                said = found[0] if which == "first" else found[-1]
                wanted = {plain(reference) for reference in references}
                accepted = bool(said) and plain(said) in wanted
                return Verdict(accepted=accepted, reason=f"said {said}")
        shown = " or ".join(map(show, patterns[:_SHOWN]))
        return Verdict(accepted=False, reason=f"the answer has no match of {shown}")

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


def _of_rule(rule: Callable[[str, tuple[str, ...]], Verdict]) -> Judge:
    """A judge of answers without their thinking."""

    def judge(judged: Judged) -> Verdict:
        answer = answer_of(judged)
        return answer if isinstance(answer, Verdict) else rule(answer, judged.references)

    return judge
