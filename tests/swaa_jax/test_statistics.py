"""Intervals, paired tests and pass@k, against enumeration and published values."""

import itertools

import numpy as np
import pytest

from swaa_jax.eval.report.statistics import bootstrap_interval, paired_p_value, pass_at_k


def test_the_interval_is_that_of_every_possible_resample():
    """Four scores have 4^4 = 256 resamples: their quantiles are known exactly."""
    scores = [0.0, 0.25, 0.5, 1.0]
    means = [np.mean(chosen) for chosen in itertools.product(scores, repeat=4)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(scores)
    assert found.mean == pytest.approx(0.4375)
    # Means are multiples of 1/16; 9,999 draws hit the exact quantile or its neighbour.
    assert abs(found.low - low) <= 1 / 16
    assert abs(found.high - high) <= 1 / 16


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = bootstrap_interval((rng.random(60) < 0.7).astype(float).tolist(), seed=trial)
        hits += found.low <= 0.7 <= found.high
    # 95% of 200 is 190; a percentile bootstrap of 60 covers a little less. Five standard
    # deviations of a binomial below 0.92 * 200.
    assert 165 <= hits <= 200


@pytest.mark.parametrize(
    "scores, low, high",
    [([1.0] * 10, 0.7225, 1.0), ([0.0] * 10, 0.0, 0.2775), ([1.0], 0.2065, 1.0)],
)
def test_all_right_or_none_has_wilsons_interval(scores, low, high):
    """Wilson's bounds z^2 / (n + z^2) from its formula: 1.96^2 / (10 + 1.96^2) = 0.2775."""
    found = bootstrap_interval(scores)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_equal_partial_scores_have_no_spread():
    found = bootstrap_interval([0.5, 0.5, 0.5])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def enumerated(ours, theirs):
    """The p-value from every swap of a sample's two scores."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    seen = abs(differences.mean())
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    means = np.abs((signs * differences).mean(axis=1))
    return (means >= seen - 1e-12).mean()


@pytest.mark.parametrize("seed", range(6))
def test_the_paired_test_is_that_of_all_swaps(seed):
    rng = np.random.default_rng(seed)
    ours, theirs = (rng.integers(0, 3, (2, 9)) / 2).tolist()
    # Samples with equal scores change nothing, so the enumeration over all nine is the same.
    assert paired_p_value(ours, theirs) == pytest.approx(enumerated(ours, theirs), abs=1e-9)


def test_many_samples_are_tested_by_random_swaps():
    """McNemar's exact test on 40 discordant pairs, 30 to 10: binomial, two-sided, 0.0022."""
    ours, theirs = [1.0] * 30 + [0.0] * 10 + [1.0] * 60, [0.0] * 30 + [1.0] * 10 + [1.0] * 60
    # 9,999 random swaps: the standard error of p = 0.0022 is 0.0005.
    assert paired_p_value(ours, theirs) == pytest.approx(0.0022, abs=0.002)
    assert paired_p_value(ours, ours) == 1.0
    assert paired_p_value([1.0, 0.5, 0.0], [0.0, 0.5, 0.0]) == 1.0  # one differs: enumerated too
    assert enumerated([1.0, 0.5, 0.0], [0.0, 0.5, 0.0]) == 1.0


@pytest.mark.parametrize("attempts, right", [(1, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(attempts, right):
    for k in range(1, attempts + 1):
        chosen = list(itertools.combinations([True] * right + [False] * (attempts - right), k))
        assert pass_at_k(attempts, right, k) == pytest.approx(np.mean([any(c) for c in chosen]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_p_value([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)
