"""How sure a score is: bootstrap intervals, paired tests, pass@k. SciPy does the work."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "Interval",
    "bootstrap_interval",
    "format_p",
    "format_score",
    "paired_p_value",
    "pass_at_k",
]

CONFIDENCE = 0.95
_RESAMPLES = 9_999


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, and where it may lie: `low` and `high` at `CONFIDENCE`."""

    mean: float
    low: float
    high: float


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of scores between 0 and 1, one a sample, and its bootstrap interval (percentiles).

    Where all scores are 0, or all are 1, resampling would give an interval without width: there the
    Wilson interval of a proportion is given.

    >>> bootstrap_interval([1.0] * 20)
    Interval(mean=1.0, low=0.8388..., high=1.0)

    Raises:
        ValueError: no score.
    """
    from scipy import stats

    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("scores: expected at least one, got none")
    mean = float(values.mean())
    if mean in (0.0, 1.0):
        wilson = stats.binomtest(round(mean * values.size), values.size).proportion_ci(
            CONFIDENCE, method="wilson"
        )
        return Interval(mean=mean, low=float(wilson.low), high=float(wilson.high))
    if np.all(values == values[0]):
        return Interval(mean=mean, low=mean, high=mean)
    found = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 2_000_000 // values.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean=mean, low=float(found.low), high=float(found.high))


def paired_p_value(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of the same samples' scores having the same mean under two policies.

    A permutation test: under the null hypothesis each sample's two scores may as well be swapped.
    All swaps are tried where they are few, else 9,999 random ones.

    >>> paired_p_value([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    0.0625

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    from scipy import stats

    first, second = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    if first.shape != second.shape or not first.size:
        raise ValueError(
            "scores: expected as many of one policy as of the other, at least one, got "
            f"{first.size} and {second.size}"
        )
    differs = first != second  # equal pairs say nothing, swapped or not
    if differs.sum() < 2:  # one pair is as far apart when it is swapped
        return 1.0
    found = stats.permutation_test(
        (first[differs], second[differs]),
        lambda one, other, axis: np.mean(one, axis=axis) - np.mean(other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 2_000_000 // int(differs.sum())),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def pass_at_k(num_attempts: int, num_right: int, k: int) -> float:
    """The chance that one of k attempts is right, estimated without bias from more (arXiv
    2107.03374, equation 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4)
    (0.25, 1.0)

    Raises:
        ValueError: more right ones than attempts, or k beyond the attempts.
    """
    if not 0 <= num_right <= num_attempts or not 1 <= k <= num_attempts:
        raise ValueError(
            f"pass@k: expected 1 <= k <= attempts and right <= attempts, got k={k}, "
            f"{num_right} right of {num_attempts}"
        )
    return 1.0 - math.comb(num_attempts - num_right, k) / math.comb(num_attempts, k)


def format_score(score: Interval) -> str:
    """A score and its interval in percent.

    >>> format_score(Interval(mean=0.5, low=0.25, high=0.75))
    '50.0% [25.0, 75.0]'
    """
    return f"{100 * score.mean:.1f}% [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def format_p(value: float) -> str:
    """A p-value to three digits.

    >>> format_p(0.02), format_p(1e-5)
    ('0.020', '<0.001')
    """
    return "<0.001" if value < 0.001 else f"{value:.3f}"
