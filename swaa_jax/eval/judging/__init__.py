"""Whether an answer is right: rules, RULER's score, or a language model over HTTP."""

import inspect
from collections.abc import Callable, Mapping

from swaa_jax.eval.judging.judge import Answer, Judge, Judged, Verdict, strip_thinking
from swaa_jax.eval.judging.language_model import LlmJudge, LlmJudgeConfig
from swaa_jax.eval.judging.rules import exact_judge, includes_judge, regex_judge, ruler_judge
from swaa_jax.eval.judging.scores import includes, plain, string_match_all
from swaa_jax.fields import check_keys, from_mapping, one_of

__all__ = [
    "JUDGES",
    "Answer",
    "Judge",
    "Judged",
    "LlmJudge",
    "LlmJudgeConfig",
    "Verdict",
    "includes",
    "make_judge",
    "plain",
    "string_match_all",
    "strip_thinking",
]


def _llm_judge(**settings: object) -> Judge:
    advice = "judge: {name: llm, url: ..., model: ...} names a model of an OpenAI-compatible API"
    return LlmJudge(from_mapping(LlmJudgeConfig, settings, "judge llm", advice=advice))


JUDGES: Mapping[str, Callable[..., Judge]] = {
    "exact": exact_judge,
    "includes": includes_judge,
    "regex": regex_judge,
    "ruler": ruler_judge,
    "llm": _llm_judge,
}
"""What makes each judge, by name; its keywords are the judge's settings.

>>> sorted(JUDGES), JUDGES["exact"] is exact_judge
(['exact', 'includes', 'llm', 'regex', 'ruler'], True)
"""


def make_judge(name: str, **settings: object) -> Judge:
    r"""The judge of that name.

    Args:
        name: "exact", "includes", "regex", "ruler" or "llm".
        settings: of :func:`includes_judge` or :func:`regex_judge`, or fields of
            :class:`LlmJudgeConfig`.

    Raises:
        ValueError: no such judge, or settings that it does not have.

    Examples:
        >>> judge = make_judge("regex", pattern=r"answer is (\w+)", which="last")
        >>> said = "The answer is A. No, the answer is B."
        >>> judge(Judged(question="Which?", references=("B",), response=said))
        Verdict(accepted=True, reason='said B', score=1.0, failed=False)
    """
    one_of(*JUDGES)("judge", name)
    make = JUDGES[name]
    if make is not _llm_judge:
        check_keys(f"judge {name}", settings, list(inspect.signature(make).parameters))
    return make(**settings)
