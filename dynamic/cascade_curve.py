"""Quality against cost: what a cascade's thresholds can buy, beside each single model and beside chance.

float64 NumPy. Letters: n rows, m models, J candidates.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .cascade import chosen_models, of_chosen


class Curve(NamedTuple):
    """One point of each candidate, by ascending cost, and the single models."""

    candidates: Float[np.ndarray, "J rules"]
    cost: Float[np.ndarray, " J"]
    """Mean of a row."""
    quality: Float[np.ndarray, " J"]
    """Mean of a row."""
    model_cost: Float[np.ndarray, " m"]
    """Of each model alone."""
    model_quality: Float[np.ndarray, " m"]

    @property
    def area(self) -> float:
        """Mean quality over the costs between the cheapest and the dearest single model.

        Between neighbouring points the curve is a line: what choosing between the two thresholds at random gives. A
        cascade that defers all costs more than its dearest model; that part of the curve is outside and counts nothing.
        """
        return _mean_height(self.cost, self.quality, self.model_cost[0], self.model_cost[-1])

    @property
    def random_area(self) -> float:
        """The same of the line between the cheapest and the dearest model: rows sent to one of them by chance, which
        pays for one model, not for both."""
        return float((self.model_quality[0] + self.model_quality[-1]) / 2)

    def within(self, budget: float) -> int:
        """Number of the candidate with the best quality whose mean cost is at most the budget; of equals the cheapest.

        Raises:
            ValueError: none costs so little.
        """
        affordable = self.cost <= budget
        if not affordable.any():
            raise ValueError(
                f"budget is {budget}; the cheapest candidate costs {self.cost.min()}, so it must be that or more"
            )
        return int(np.argmax(np.where(affordable, self.quality, -np.inf)))


def cascade_curve(
    scores: Float[np.ndarray, "n rules"],
    quality: Float[np.ndarray, "n m"],
    costs: Float[np.ndarray, " m"],
    candidates: Float[np.ndarray, "J rules"] | None = None,
) -> Curve:
    """The curve over rows that every model has answered.

    Args:
        scores: of the rules, `Cascade.outcomes`.
        quality: of each model's answer to each row, higher is better.
        costs: of each model alone.
        candidates: thresholds; None, with one rule: every threshold that makes a difference.

    Raises:
        ValueError: there are several rules and no candidates, or shapes do not match.
    """
    rows, rules = scores.shape
    if quality.shape != (rows, rules + 1) or costs.shape != (rules + 1,):
        raise ValueError(
            f"quality has the shape {quality.shape} and costs {costs.shape}; with scores of {rows} rows and {rules} "
            f"rules they must have {(rows, rules + 1)} and {(rules + 1,)}"
        )
    if candidates is None:
        if rules != 1:
            raise ValueError(f"candidates is None; with {rules} rules name them, as thresholds_by_level does")
        candidates = np.append(np.unique(scores[:, 0]), np.inf)[:, None]
    paid, cost, mean = np.cumsum(costs), np.zeros(len(candidates)), np.zeros(len(candidates))
    for j in range(len(candidates)):  # One by one: rows times candidates may not fit into memory.
        chosen = chosen_models(scores, candidates[j : j + 1])
        cost[j], mean[j] = paid[chosen].mean(), of_chosen(quality, chosen).mean()
    order = np.lexsort((-mean, cost))
    return Curve(candidates[order], cost[order], mean[order], costs, quality.mean(axis=0))


def _mean_height(x: Float[np.ndarray, " J"], y: Float[np.ndarray, " J"], low: float, high: float) -> float:
    if x[0] > low or x[-1] < high:
        raise ValueError(
            f"candidates cost {x[0]} to {x[-1]}; the area needs the costs of the single models, {low} to {high}: add a "
            "candidate that hands nothing on and one that hands all on"
        )
    # Of points with one cost the best counts.
    x, first = np.unique(x, return_index=True)
    y = y[first]
    inside = x[(x > low) & (x < high)]
    grid = np.concatenate([[low], inside, [high]])
    heights = np.interp(grid, x, y)
    return float((np.diff(grid) * (heights[1:] + heights[:-1]) / 2).sum() / (high - low))
