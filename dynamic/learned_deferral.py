"""A deferral rule that is learned: logistic regression on features of an input and its answer.

Chen et al. 2023 (FrugalGPT), https://arxiv.org/abs/2305.05176, learn such a scorer with a small language model. float64
NumPy; Newton's method without any chance, so the same data give the same rule. Letters: n rows, R rows, D features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from .deferral import Answers, Deferral

_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class LearnedDeferral(Deferral):
    """The chance that an answer is good enough, from `Answers.features`."""

    weights: tuple[float, ...]
    """Of the features."""
    bias: float

    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        if answers.features is None or answers.features.shape[1] != len(self.weights):
            found = "None" if answers.features is None else f"{answers.features.shape[1]} a row"
            raise ValueError(f"answers.features is {found}; LearnedDeferral was fitted on {len(self.weights)} a row")
        return _sigmoid(np.asarray(answers.features, np.float64) @ np.array(self.weights) + self.bias)

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__, "weights": list(self.weights), "bias": self.bias}


def fit_deferral(
    features: Float[np.ndarray, "n D"], good: Bool[np.ndarray, " n"], *, ridge: float = 1e-3
) -> LearnedDeferral:
    """The rule with the least mean cross-entropy on answers whose worth is known.

    Args:
        features: of the answers.
        good: which of them need no larger model: they are right, or the larger model is wrong too.
        ridge: times half the squared length of the weights of standardised features is added, so that separable data
            have a finite answer too.

    Raises:
        ValueError: a feature is not finite, all answers are alike, or `ridge` is not positive.
    """
    features = np.asarray(features, np.float64)
    if not 0 < ridge < np.inf:
        raise ValueError(f"ridge is {ridge}; it must be above 0 and finite")
    if not np.isfinite(features).all():
        raise ValueError("features holds a number that is not finite")
    if good.all() or not good.any():
        raise ValueError(f"good is {bool(good.all())} for every row; a rule is learned from both kinds")
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1)
    design = np.concatenate([(features - mean) / deviation, np.ones((len(features), 1))], axis=1)
    penalty = np.full(design.shape[1], ridge)
    penalty[-1] = 0
    found = _newton(design, good.astype(np.float64), penalty)
    weights = found[:-1] / deviation
    return LearnedDeferral(weights=tuple(weights.tolist()), bias=float(found[-1] - weights @ mean))


def _newton(
    design: Float[np.ndarray, "n D"], good: Float[np.ndarray, " n"], penalty: Float[np.ndarray, " D"]
) -> Float[np.ndarray, " D"]:
    def loss(w: Float[np.ndarray, " D"]) -> float:
        z = design @ w
        return float((np.logaddexp(0, z) - good * z).mean() + 0.5 * (penalty * w * w).sum())

    w = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(design @ w)
        slope = design.T @ (p - good) / len(good) + penalty * w
        if np.abs(slope).max() < 1e-12:
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(good) + np.diag(penalty)
        step, size = np.linalg.lstsq(curvature, slope, rcond=None)[0], 1.0
        # A full step can overshoot; a short enough one descends, down to what float64 can tell.
        while loss(w - size * step) > loss(w) and size > 1e-10:
            size /= 2
        w = w - size * step
    return w


def _sigmoid(z: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    return np.exp(-np.logaddexp(0, -z))
