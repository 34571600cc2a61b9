"""Thresholds from a budget: how many rows may leave where, so that their mean cost is what one can pay.

Huang et al. 2018 (MSDNet), https://arxiv.org/abs/1703.09844, section 5 and appendix: shares of exits form a geometric
series, and each threshold lets its share leave. No statement about quality: for that, `learn_then_test`. float64 NumPy.
Letters: n rows, N exits, the last one's among them.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .thresholds import PerExit

_STEPS = 200


class BudgetedThresholds(NamedTuple):
    """Thresholds and what they do on the rows that they were chosen on."""

    thresholds: PerExit
    shares: Float[np.ndarray, " N"]
    """Of the rows that leave at each exit."""
    cost: float
    """Mean of a row, in the unit of the costs; at most the budget."""


def budgeted_thresholds(
    scores: Float[np.ndarray, "n N"], costs: Float[np.ndarray, " N"], budget: float
) -> BudgetedThresholds:
    """One threshold per exit, whose mean cost on these rows is at most the budget.

    The paper's chance to leave at an exit is the same at all of them, between 0 and 1, so that early exits always
    serve the most; here the series may also grow, else a budget above the mean of the costs could not be used.

    Args:
        scores: confidence of each row at each exit, 0 to 1, on held-out rows; the last exit's are not read.
        costs: of a row that leaves at each exit, all that ran before it included, ascending.
        budget: mean cost of a row, in the unit of `costs`.

    Raises:
        ValueError: the budget is below the cheapest exit's cost, or the costs do not ascend.
    """
    rows, exits = scores.shape
    if costs.shape != (exits,) or exits < 2 or not (np.diff(costs) > 0).all() or costs[0] < 0:
        raise ValueError(
            f"costs is {costs.tolist()} with {exits} exits; it must ascend from 0 or more, one of each exit"
        )
    if not costs[0] <= budget < math.inf:
        raise ValueError(f"budget is {budget}; the cheapest exit costs {costs[0]}, so it must be that or more")
    if not ((scores >= 0) & (scores <= 1)).all() or rows < 1:
        raise ValueError("scores must hold numbers 0 to 1, of one row at least")
    wanted = _geometric(costs, min(budget, float(costs[-1])))
    # Of rows that are left at exit k, so many have to be gone in all; rounded so that the cost errs downwards.
    gone = np.minimum(np.ceil(rows * np.cumsum(wanted) - 1e-9), rows).astype(int)
    left, thresholds, counts = np.arange(rows), [], []
    for k in range(exits - 1):
        leave = max(int(gone[k]) - (rows - len(left)), 0)
        ranked = np.sort(scores[left, k])[::-1]
        # A float32 score must reach its own threshold, so that is a float32 too. Ties leave together.
        threshold = float(np.float32(ranked[leave - 1])) if leave else math.inf
        leaves = scores[left, k].astype(np.float32) >= threshold
        thresholds.append(threshold)
        counts.append(int(leaves.sum()))
        left = left[~leaves]
    shares = np.array([*counts, len(left)]) / rows
    return BudgetedThresholds(PerExit(thresholds=tuple(thresholds)), shares, float(shares @ costs))


def _geometric(costs: Float[np.ndarray, " N"], budget: float) -> Float[np.ndarray, " N"]:
    """Shares in proportion to ratio^k with a mean cost of `budget`."""

    def shares(log_ratio: float) -> Float[np.ndarray, " N"]:
        logs = log_ratio * np.arange(len(costs))
        weights = np.exp(logs - logs.max())
        return weights / weights.sum()

    low, high = -800.0, 800.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ costs < budget else (low, middle)
    return shares(low)
