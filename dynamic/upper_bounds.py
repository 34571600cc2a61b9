"""Upper confidence bounds of an expected loss, by inverting a p-value. float64.

Bates et al. 2021, "Distribution-Free, Risk-Controlling Prediction Sets", https://arxiv.org/abs/2101.02703, section 3:
the bound is the greatest risk that the losses do not refute. Letters: n calibration units, J candidates.
"""

import numpy as np
from jaxtyping import Float

from .guarantee import check_levels
from .p_values import HoeffdingBentkus, PValue

_STEPS = 40
"""Halvings: the bound is exact to 1e-12."""


def upper_bounds(
    losses: Float[np.ndarray, "n J"], *, epsilon: float, p_value: PValue | None = None
) -> Float[np.ndarray, " J"]:
    """Of each candidate a number that its expected loss exceeds with a chance of at most epsilon.

    The risk-controlling choice of that paper, the riskiest candidate with bounds of at most delta there and at all
    safer ones, is `learn_then_test` with the same p-value.

    Args:
        losses: between 0 and 1.
        epsilon: of each bound; it is not shared among the candidates.
        p_value: the test that is inverted; None: Hoeffding-Bentkus.

    Raises:
        ValueError: a loss or epsilon is out of its range.
    """
    losses = np.asarray(losses, np.float64)
    check_levels(0.5, epsilon)
    if not losses.size or not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f"losses has the shape {losses.shape}; it must hold numbers 0 to 1, of one unit at least")
    test = HoeffdingBentkus() if p_value is None else p_value
    return np.array([_upper_bound(losses[:, j : j + 1], epsilon, test) for j in range(losses.shape[1])])


def _upper_bound(losses: Float[np.ndarray, "n 1"], epsilon: float, test: PValue) -> float:
    # A p-value falls as the risk that it tests grows.
    possible, refuted = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (possible + refuted) / 2
        if test(losses, middle, epsilon)[0] <= epsilon:
            refuted = middle
        else:
            possible = middle
    return refuted
