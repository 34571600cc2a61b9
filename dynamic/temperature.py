"""Temperature scaling: one number per exit that makes its probabilities mean what they say.

Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599. It changes no answer of
an exit, but lets one threshold mean the same at all of them. float64 NumPy. Letters: n rows, V classes, N exits.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_LOW, _HIGH = 1e-3, 1e3
"""Inverse temperatures that are looked at."""
_STEPS = 60


class TemperatureFit(NamedTuple):
    """A temperature, and what it does to the logits that it was fitted on."""

    temperature: float
    """Divide the exit's logits by it."""
    nats_before: float
    """Mean negative log-likelihood of the labels."""
    nats_after: float
    error_before: float
    """Expected calibration error."""
    error_after: float


def fit_temperature(logits: Float[np.ndarray, "n V"], labels: Int[np.ndarray, " n"]) -> TemperatureFit:
    """The temperature with the least negative log-likelihood of held-out labels.

    The likelihood is convex in 1 / temperature, so the sign of its slope leads to the one minimum.

    Args:
        logits: of one exit, on data that it was not trained on.
        labels: the right classes.

    Raises:
        ValueError: there is no minimum between 0.001 and 1000: every label has the highest logit already, or the logits
            say nothing about the labels.
    """
    logits = np.asarray(logits, np.float64)
    if not logits.size or not np.isfinite(logits).all():
        raise ValueError(f"logits has the shape {logits.shape}; it must hold finite numbers, of one row at least")
    right = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0].mean()

    def slope(inverse: float) -> float:
        return float((_softmax(inverse * logits) * logits).sum(axis=1).mean() - right)

    low, high = np.log(_LOW), np.log(_HIGH)
    if not slope(_LOW) < 0 < slope(_HIGH):
        raise ValueError(
            f"logits have no best temperature between {1 / _HIGH:g} and {1 / _LOW:g}: "
            + ("they never err" if slope(_HIGH) <= 0 else "a lower logit goes with the label")
            + "; give more, or other, held-out rows"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    inverse = float(np.exp((low + high) / 2))
    before, after = _softmax(logits), _softmax(inverse * logits)
    return TemperatureFit(
        1 / inverse,
        _nats(logits, labels),
        _nats(inverse * logits, labels),
        calibration_error(before, labels),
        calibration_error(after, labels),
    )


def fit_temperatures(logits: Float[np.ndarray, "N n V"], labels: Int[np.ndarray, " n"]) -> list[TemperatureFit]:
    """One fit of each exit."""
    return [fit_temperature(exit_logits, labels) for exit_logits in logits]


def calibration_error(probabilities: Float[np.ndarray, "n V"], labels: Int[np.ndarray, " n"], bins: int = 15) -> float:
    """Expected calibration error: |share that is right - mean confidence| of bins of equal width, weighed by rows.

    Guo et al. 2017, eq. 5; a confidence on a border belongs to the bin below it.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _softmax(logits: Float[np.ndarray, "n V"]) -> Float[np.ndarray, "n V"]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _nats(logits: Float[np.ndarray, "n V"], labels: Int[np.ndarray, " n"]) -> float:
    top = logits.max(axis=1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((total - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]).mean())
