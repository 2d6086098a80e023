"""Which candidate explains a server's replies: pure functions of numbers and texts.

A candidate says which token is the likeliest at each step, by which gap, and how likely each one
is. A server that runs it says the same but for its noise: another number format, kernels that add
in another order. With noise of scale s

    it goes along with a gap g            probability  1 / (1 + exp(-g / s))
    it jumps over a gap j                              1 / (1 + exp(j / s))
    its log-probability is off by r       density      exp(-|r| / s) / 2s

whose tails are heavier than a Gaussian's, so that one odd value decides nothing. The scale is not
known: each candidate has the one that suits it best, of some about the noise that was measured when
the record was made. The log-likelihoods of all candidates are then compared.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from swaa_jax.fields import wrong
from swaa_jax.verify.candidates import RECORDED
from swaa_jax.verify.paths import LARGE_JUMP, Comparison, Reply, compare
from swaa_jax.verify.record import Record

__all__ = ["Evidence", "Verdict", "as_dict", "decide"]

_LARGE_RESIDUAL = 3.0  # the same of log-probabilities: half of them are further off
_DECISIVE = math.log(100.0)  # of the likelihoods of the best candidate and of the next
_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the logistic distribution with the record's noise
_STANDARD = math.pi / math.sqrt(3.0)  # deviation of the logistic distribution of scale 1

Answer = Literal["same", "other", "none", "unclear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """How the replies go with one candidate.

    Attributes:
        name: the candidate's.
        log_likelihood: of the replies.
        agreed: replies that never leave its path.
        large_jumps: replies that leave it over a gap that noise does not explain.
        residual: the median of log-probabilities' distances; None: the server gave none.
    """

    name: str
    log_likelihood: float
    agreed: int
    large_jumps: int
    residual: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a server runs.

    Attributes:
        answer: `same` for the recorded policy; `other`: the candidate of this name; `none`: no
            candidate explains the replies; `unclear`: several do.
        name: of the candidate that explains the replies best.
        rival: the next best.
        evidence: of all candidates, the best first.
        num_probes: replies that were compared.
        has_logprobs: whether the server gave log-probabilities.
    """

    answer: Answer
    name: str
    rival: str
    evidence: tuple[Evidence, ...]
    num_probes: int
    has_logprobs: bool


def decide(record: Record, replies: Sequence[Reply]) -> Verdict:
    """The candidate that explains the replies.

    Args:
        record: with the probes.
        replies: to each probe, in their order.

    Raises:
        ValueError: not as many replies as probes.
    """
    if len(replies) != len(record.probes):
        raise wrong("replies", f"{len(record.probes)}, one of each probe", len(replies))
    compared = {
        name: [
            compare(probe.paths[name], reply)
            for probe, reply in zip(record.probes, replies, strict=True)
        ]
        for name in record.names
    }
    evidence = [_evidence(name, each, record.noise) for name, each in compared.items()]
    evidence.sort(key=lambda one: -one.log_likelihood)
    best, rival = evidence[:2]
    answer: Answer = "same" if best.name == RECORDED else "other"
    if not _explains(best, len(replies), record.noise):
        answer = "none"
    elif best.log_likelihood - rival.log_likelihood < _DECISIVE:
        answer = "unclear"
    return Verdict(
        answer=answer,
        name=best.name,
        rival=rival.name,
        evidence=tuple(evidence),
        num_probes=len(replies),
        has_logprobs=best.residual is not None,
    )


def _explains(evidence: Evidence, num_probes: int, noise: float) -> bool:
    """Whether noise explains what is left between a candidate and the replies."""
    if evidence.large_jumps > max(1, num_probes // 10):
        return False
    return evidence.residual is None or evidence.residual <= _LARGE_RESIDUAL * noise


def _evidence(name: str, compared: Sequence[Comparison], noise: float) -> Evidence:
    scales = [noise / _STANDARD * one for one in _SCALES]
    residuals = [abs(r) for one in compared for step in one.residuals for r in step]
    return Evidence(
        name=name,
        log_likelihood=max(sum(_log_likelihood(c, s) for c in compared) for s in scales),
        agreed=sum(one.jumped is None for one in compared),
        large_jumps=sum((one.jumped or 0.0) > LARGE_JUMP * noise for one in compared),
        residual=statistics.median(residuals) if residuals else None,
    )


def _log_likelihood(compared: Comparison, scale: float) -> float:
    found = sum(-_softplus(-gap / scale) for gap in compared.agreed)
    if compared.jumped is not None:
        found -= _softplus(compared.jumped / scale)
    for step in compared.residuals:  # a step counts once, however many tokens are compared
        found -= statistics.fmean(abs(one) for one in step) / scale + math.log(2.0 * scale)
    return found


def _softplus(x: float) -> float:
    """log(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def as_dict(verdict: Verdict, record: Record) -> Mapping[str, object]:
    """A verdict as JSON's types."""
    found = verdict.answer in ("same", "other")
    return {
        "answer": verdict.answer,
        "runs": verdict.name if found else None,
        "runs_policy": str(record.policy_of(verdict.name)) if found else None,
        "recorded_policy": str(record.policy),
        "best": verdict.name,
        "rival": verdict.rival,
        "num_probes": verdict.num_probes,
        "has_logprobs": verdict.has_logprobs,
        "noise": record.noise,
        "evidence": [dataclasses.asdict(one) for one in verdict.evidence],
    }
