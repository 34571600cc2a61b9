"""Thresholds from a budget: their cost counted by a plain loop over rows."""

import math

import numpy as np
import pytest

from dynamoe.dynamic import budgeted_thresholds

SCORES = np.random.default_rng(0).uniform(size=(500, 4))
COSTS = np.array([1.0, 2.5, 3.0, 6.0])


def mean_cost(scores: np.ndarray, thresholds: tuple[float, ...]) -> float:
    total = 0.0
    for row in scores.astype(np.float32):
        leaves = [k for k, threshold in enumerate(thresholds) if row[k] >= threshold]
        total += COSTS[leaves[0] if leaves else 3]
    return total / len(scores)


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 3.125, 4.5, 6.0, 99.0])
def test_the_cost_is_what_was_said_within_the_budget_and_close_to_it(budget):
    found = budgeted_thresholds(SCORES, COSTS, budget)
    np.testing.assert_allclose(mean_cost(SCORES, found.thresholds.thresholds), found.cost)
    assert found.cost <= budget + 1e-9
    # At most one row an exit goes earlier than it might.
    assert found.cost >= min(budget, 6.0) - (COSTS[-1] - COSTS[0]) * 3 / 500


def test_shares_form_a_geometric_series():
    found = budgeted_thresholds(SCORES, COSTS, 2.0)
    ratios = found.shares[1:] / found.shares[:-1]
    np.testing.assert_allclose(ratios, ratios[0], atol=0.05)


def test_all_leave_at_once_or_at_the_end_where_the_budget_says_so():
    np.testing.assert_array_equal(budgeted_thresholds(SCORES, COSTS, 1.0).shares, [1, 0, 0, 0])
    assert budgeted_thresholds(SCORES, COSTS, 6.0).thresholds.thresholds == (math.inf,) * 3


def test_ties_leave_together_so_the_budget_holds():
    found = budgeted_thresholds(np.full((10, 4), 0.5), COSTS, 3.0)
    np.testing.assert_array_equal(found.shares, [1, 0, 0, 0])


def test_bad_budgets_and_costs_are_refused():
    with pytest.raises(ValueError, match="budget is 0.5; the cheapest exit costs 1.0"):
        budgeted_thresholds(SCORES, COSTS, 0.5)
    with pytest.raises(ValueError, match="it must ascend"):
        budgeted_thresholds(SCORES, COSTS[::-1].copy(), 3.0)
    with pytest.raises(ValueError, match="scores must hold numbers 0 to 1"):
        budgeted_thresholds(SCORES + 1, COSTS, 3.0)
