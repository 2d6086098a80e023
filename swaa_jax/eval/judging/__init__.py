"""Whether an answer is right: rules, RULER's score, or a language model over HTTP."""

from collections.abc import Callable, Mapping
from typing import Any

from swaa_jax.eval.judging.judge import Answer, Judge, Judged, Verdict, strip_thinking
from swaa_jax.eval.judging.language_model import LlmJudge, LlmJudgeConfig
from swaa_jax.eval.judging.rules import exact_judge, includes_judge, regex_judge, ruler_judge
from swaa_jax.eval.judging.scores import includes, plain, string_match_all

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
