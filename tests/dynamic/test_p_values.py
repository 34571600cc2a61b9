"""P-values and bounds: binomial tails in whole numbers, the paper's formula, validity by simulation."""

from fractions import Fraction
from math import comb, e, exp, log

import numpy as np
import pytest
from scipy import stats

from dynamoe.dynamic import Betting, Hoeffding, HoeffdingBentkus, upper_bounds
from dynamoe.dynamic.p_values import log_binomial_tails

ALL = [Hoeffding(), HoeffdingBentkus(), Betting()]


def name(value) -> str:
    return type(value).__name__


@pytest.mark.parametrize("n, chance", [(1, Fraction(1, 2)), (40, Fraction(1, 20)), (300, Fraction(9, 10))])
def test_binomial_tails_equal_exact_fractions(n, chance):
    terms = [comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(n + 1)]
    tails = [sum(terms[: k + 1]) for k in range(n + 1)]
    exact = [log(tail.numerator) - log(tail.denominator) for tail in tails]
    np.testing.assert_allclose(log_binomial_tails(n, float(chance)), exact, rtol=1e-10, atol=1e-12)


def test_binomial_tails_equal_scipy_far_out():
    k = np.arange(20001)
    expected = stats.binom.logcdf(k, 20000, 0.05)
    far = expected > -600
    np.testing.assert_allclose(log_binomial_tails(20000, 0.05)[far], expected[far], rtol=1e-8, atol=1e-10)


def test_hoeffding_bentkus_by_hand():
    # 100 units, 2 of them lost, delta 0.05: mean 0.02.
    losses = np.zeros((100, 1))
    losses[:2] = 1
    kl = 0.02 * log(0.02 / 0.05) + 0.98 * log(0.98 / 0.95)
    tail = sum(comb(100, k) * 0.05**k * 0.95 ** (100 - k) for k in range(3))
    expected = min(exp(-100 * kl), e * tail)
    np.testing.assert_allclose(HoeffdingBentkus()(losses, 0.05, 0.05), [expected], rtol=1e-10)
    np.testing.assert_allclose(Hoeffding()(losses, 0.05, 0.05), [exp(-2 * 100 * 0.03**2)], rtol=1e-10)


def test_a_whole_sum_of_losses_is_not_rounded_up():
    # 0.29 * 100 is 28.999999999999996, and 1.1 * 3 / 3 errs the other way: whole sums must stay what they are.
    for n in range(2, 300):
        for lost in (1, n // 3 + 1):
            losses = np.zeros((n, 1))
            losses[:lost] = 1
            tail = np.exp(min(1 + stats.binom.logcdf(lost, n, 0.4), 0))
            np.testing.assert_allclose(HoeffdingBentkus._bentkus(n, losses.mean(axis=0), 0.4), [tail], rtol=1e-8)


def test_betting_by_its_recursion_in_plain_python():
    losses, delta, epsilon = np.random.default_rng(0).uniform(size=(30, 1)) * 0.2, 0.3, 0.1
    wealth, best, total, squares, variance = 1.0, 1.0, 0.0, 0.0, 0.25
    for i, x in enumerate(losses[:, 0].tolist(), start=1):
        wealth *= 1 - min(1, (2 * log(1 / epsilon) / (30 * variance)) ** 0.5) * (x - delta)
        best = max(best, wealth)
        total += x
        squares += (x - (0.5 + total) / (1 + i)) ** 2
        variance = (0.25 + squares) / (1 + i)
    np.testing.assert_allclose(Betting()(losses, delta, epsilon), [1 / best], rtol=1e-10)


@pytest.mark.parametrize("test", ALL, ids=name)
@pytest.mark.parametrize("kind", ["0 or 1", "between"])
def test_p_values_are_super_uniform_where_the_risk_is_delta(test, kind):
    # 4,000 calibration sets in 4,000 columns. Shares may pass u by 4 standard deviations.
    rng, n, delta = np.random.default_rng(1), 60, 0.1
    losses = rng.uniform(size=(n, 4000)) < delta if kind == "0 or 1" else rng.beta(0.5, 4.5, size=(n, 4000))
    p = test(losses.astype(np.float64), delta, 0.05)
    for u in (0.01, 0.05, 0.1, 0.3):
        assert (p <= u).mean() <= u + 4 * (u * (1 - u) / 4000) ** 0.5


@pytest.mark.parametrize("test", ALL, ids=name)
def test_p_values_fall_as_delta_grows(test):
    losses = np.random.default_rng(2).uniform(size=(50, 3)) ** 3
    p = np.stack([test(losses, delta, 0.05) for delta in np.linspace(0.01, 0.99, 50)])
    assert (np.diff(p, axis=0) <= 1e-12).all()


def test_hoeffding_bentkus_grows_with_the_loss_and_is_never_above_hoeffding():
    losses = (np.arange(40)[:, None] < np.arange(41)[None]).astype(np.float64)  # 0, 1, ..., 40 lost
    p = HoeffdingBentkus()(losses, 0.3, 0.05)
    assert (np.diff(p) >= -1e-15).all()
    assert (p <= Hoeffding()(losses, 0.3, 0.05) + 1e-15).all()


@pytest.mark.parametrize("test", ALL, ids=name)
def test_upper_bounds_invert_the_p_value(test):
    losses = np.random.default_rng(3).uniform(size=(80, 2)) ** 4
    for j, bound in enumerate(upper_bounds(losses, epsilon=0.1, p_value=test)):
        column = losses[:, j : j + 1]
        assert losses[:, j].mean() < bound < 1
        assert test(column, bound - 1e-6, 0.1)[0] > 0.1 >= test(column, bound + 1e-9, 0.1)[0]


@pytest.mark.parametrize("test", ALL, ids=name)
def test_a_bound_is_at_most_delta_exactly_where_the_test_of_delta_passes(test):
    losses = (np.arange(150)[:, None] < np.arange(0, 20)[None]).astype(np.float64)[
        np.random.default_rng(5).permutation(150)
    ]
    passes = test(losses, 0.1, 0.05) <= 0.05
    assert 0 < passes.sum() < 20
    np.testing.assert_array_equal(upper_bounds(losses, epsilon=0.05, p_value=test) <= 0.1, passes)


def test_upper_bounds_at_the_ends():
    np.testing.assert_allclose(upper_bounds(np.zeros((59, 1)), epsilon=0.05), [1 - 0.05 ** (1 / 59)], atol=1e-10)
    np.testing.assert_allclose(upper_bounds(np.ones((10, 1)), epsilon=0.05), [1], atol=1e-10)


def test_betting_is_less_conservative_where_losses_vary_little():
    losses = np.full((400, 1), 0.2) + np.random.default_rng(4).uniform(-0.02, 0.02, size=(400, 1))
    by_mean, by_bets = (upper_bounds(losses, epsilon=0.05, p_value=test)[0] for test in (HoeffdingBentkus(), Betting()))
    assert by_bets < by_mean


def test_bad_levels_and_losses_are_refused():
    with pytest.raises(ValueError, match=r"epsilon is 0.0; it must be above 0 and below 1"):
        upper_bounds(np.zeros((5, 1)), epsilon=0.0)
    with pytest.raises(ValueError, match=r"losses has the shape \(5, 1\); it must hold numbers 0 to 1"):
        upper_bounds(np.full((5, 1), 1.5), epsilon=0.1)
