"""Paired statistics against hand calculations, scipy's own tests and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from dynamoe.experiments.reproduction.comparing import (
    detectable_errors,
    interval_place,
    median_ratio,
    paired_difference,
)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3) = 0.57735.
    # The 97.5% quantile of t with 2 degrees of freedom is 4.30265: half the interval is 2.48414.
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.value == 2.0 and found.pairs == 3
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-5)
    assert found.high == pytest.approx(2 + 2.48414, abs=1e-5)
    assert found.detectable == pytest.approx(5.65349 * 0.57735, abs=1e-4)


def test_paired_interval_is_that_of_scipys_paired_test() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 7)).tolist()
    found, test = paired_difference(first, second), stats.ttest_rel(first, second)
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_pairs_that_share_their_spread_are_told_apart() -> None:
    found = paired_difference([1.01, 5.012, 9.011], [1.0, 5.0, 9.0])
    assert found.low > 0


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_detectable_effect_is_found_four_times_in_five(pairs: int) -> None:
    effect = detectable_errors(pairs) / math.sqrt(pairs)  # in standard deviations
    draws = np.random.default_rng(pairs).normal(effect, 1.0, size=(40_000, pairs))
    significant = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert significant.mean() == pytest.approx(0.8, abs=0.01)  # 5 standard errors of the simulation


def test_median_ratio_by_hand() -> None:
    # Of six values the interval reaches from the first to the last: both halves of 2^-6 left out are 3.1%.
    found = median_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 100.0], [1.0] * 6)
    assert (found.value, found.low, found.high, found.pairs, found.detectable) == (3.5, 1.0, 100.0, 6, None)
    # Of nine, one value from each end is left out: 2 (1 + 9) / 2^9 = 3.9%; two would be 18%.
    found = median_ratio([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0], [2.0] * 9)
    assert (found.value, found.low, found.high) == (2.5, 1.0, 4.0)


@pytest.mark.parametrize("count", [6, 9, 30, 101])
def test_median_interval_is_the_narrowest_that_a_fair_coin_allows(count: int) -> None:
    place = interval_place(count)
    assert 2 * stats.binom.cdf(place, count, 0.5) <= 0.05 < 2 * stats.binom.cdf(place + 1, count, 0.5)


def test_too_few_or_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="first has 1 values; an interval needs at least 2 pairs"):
        paired_difference([1.0], [2.0])
    with pytest.raises(ValueError, match="first has 5 values; an interval needs at least 6 pairs"):
        median_ratio([1.0] * 5, [1.0] * 5)
    with pytest.raises(ValueError, match="first has 3 values and second 2; they are pairs"):
        paired_difference([1.0, 2.0, 3.0], [2.0, 3.0])
