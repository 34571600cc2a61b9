"""Learn-then-Test: thresholds whose risk is bounded with high probability, whatever the model and the data are.

Angelopoulos et al. 2021, "Learn then Test", https://arxiv.org/abs/2110.01052; for exits, Schuster et al. 2022 (CALM),
https://arxiv.org/abs/2207.07061, section 4.

Losses must come from the model as it is deployed: the same confidence, exits, cache and batch policy. Candidates must
be fixed without a look at these losses. Letters: n calibration units (prompts, images), J candidates.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from .guarantee import Guarantee, Policy, check_levels
from .p_values import HoeffdingBentkus, PValue
from .thresholds import check_threshold

Candidate = float | tuple[float, ...]
"""A threshold; of a cascade, one of each model but the last."""


def learn_then_test(
    losses: Float[np.ndarray, "n J"],
    candidates: Sequence[Candidate],
    *,
    policy: Policy,
    risk: str,
    unit: str,
    delta: float,
    epsilon: float,
    costs: Float[np.ndarray, "n J"] | None = None,
    p_value: PValue | None = None,
) -> Guarantee:
    """The riskiest candidate that passes, by fixed-sequence testing: from the safest on, until one fails.

    The order is fixed beforehand, so no correction for J tests is needed: a false pass first happens at the first
    candidate whose risk is above delta, with a chance of at most epsilon. Where not even the safest candidate passes,
    the full model answers (`Guarantee.threshold` is None), whose risk is 0 by definition of the loss.

    Args:
        losses: between 0 and 1; 0 where the full model answers.
        candidates: thresholds in the order of `losses`' columns, from the safest to the riskiest, descending.
        policy: how the answers were made.
        risk: name of the loss.
        unit: what a row of `losses` is, in the plural.
        delta: bound of the expected loss.
        epsilon: chance that the bound does not hold.
        costs: of the same answers; only their mean is told.
        p_value: the test; None: Hoeffding-Bentkus.

    Raises:
        ValueError: an argument is out of its range, or there are too few units: even without any loss they could not
            show what is asked; says how many are needed.
    """
    losses = check_losses(losses, candidates)
    check_levels(delta, epsilon)
    if costs is not None and costs.shape != losses.shape:
        raise ValueError(f"costs has the shape {costs.shape}; it must be that of losses, {losses.shape}")
    test = HoeffdingBentkus() if p_value is None else p_value
    if len(losses) < (needed := units_needed(delta, epsilon, test)):
        raise ValueError(
            f"losses has {len(losses)} units; delta = {delta:g} with epsilon = {epsilon:g} needs at least {needed}, "
            "and more where any loss occurs"
        )
    p_values = test(losses, delta, epsilon)
    passed = count_passed(p_values, epsilon)
    last = passed - 1
    return Guarantee(
        threshold=candidates[last] if passed else None,
        policy=policy,
        risk=risk,
        unit=unit,
        delta=delta,
        epsilon=epsilon,
        n=len(losses),
        empirical_risk=float(losses[:, last].mean()) if passed else 0.0,
        p_value=float(p_values[last]) if passed else 0.0,
        cost=float(costs[:, last].mean()) if passed and costs is not None else math.nan,
        method=f"fixed-sequence test of {len(candidates)} candidates by {type(test).__name__}",
    )


def count_passed(p_values: Float[np.ndarray, " J"], epsilon: float) -> int:
    """How many candidates, from the first, have p-values of at most epsilon without a gap."""
    return int(np.logical_and.accumulate(p_values <= epsilon).sum())


def units_needed(delta: float, epsilon: float, p_value: PValue | None = None) -> int:
    """The fewest units that can show the bound, if none of them has any loss."""
    check_levels(delta, epsilon)
    test = HoeffdingBentkus() if p_value is None else p_value

    def shows(n: int) -> bool:
        return bool(test(np.zeros((n, 1)), delta, epsilon)[0] <= epsilon)

    most = 1
    while not shows(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if shows(middle) else (middle, most)
    return most


def check_losses(losses: Float[np.ndarray, "n J"], candidates: Sequence[Candidate]) -> Float[np.ndarray, "n J"]:
    """The losses in float64.

    Raises:
        ValueError: a loss or a candidate is out of its range, or the candidates do not descend.
    """
    losses = np.asarray(losses, np.float64)
    if losses.shape[0] < 1 or losses.shape[1] != len(candidates) or not candidates:
        raise ValueError(
            f"losses has the shape {losses.shape} with {len(candidates)} candidates; it must be [units, candidates], "
            "with at least one of each"
        )
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f"losses lie between {losses.min()} and {losses.max()}; they must be 0 to 1")
    rows = [np.atleast_1d(np.asarray(candidate, np.float64)) for candidate in candidates]
    for row in rows:
        for value in row:
            check_threshold("candidates", float(value))
    for safer, riskier in zip(rows, rows[1:], strict=False):
        if safer.shape != riskier.shape or (riskier > safer).any():
            raise ValueError(
                f"candidates has {riskier.tolist()} after {safer.tolist()}; they must descend, from the safest to the "
                "riskiest, all of one length"
            )
    return losses
