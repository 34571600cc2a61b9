"""What an early answer costs in quality: losses between 0 and 1 of one calibration unit each, for `learn_then_test`.

float64 NumPy. Letters: n units, S tokens of an answer.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int


def disagreement(
    early: Int[np.ndarray, "n S"], full: Int[np.ndarray, "n S"], counted: Bool[np.ndarray, "n S"] | None = None
) -> Float[np.ndarray, " n"]:
    """Share of an answer's tokens that differ from the full model's; with one token an answer, 0 or 1.

    Args:
        early: tokens or classes that the policy gave.
        full: that the full model gave.
        counted: tokens that are part of the answer; None: all. Where two answers differ in length, count to the end of
            the longer one.

    Raises:
        ValueError: an answer has no token that counts.
    """
    counted = np.ones(full.shape, bool) if counted is None else counted
    tokens = counted.sum(axis=1)
    if not tokens.all():
        raise ValueError(f"counted has no token of answer {int(np.argmin(tokens))}; each needs at least one")
    return ((early != full) & counted).sum(axis=1) / tokens


def loss_of_quality(
    early: Float[np.ndarray, " n"], full: Float[np.ndarray, " n"], *, scale: float
) -> Float[np.ndarray, " n"]:
    """How much worse than the full model, (full - early) / scale, clipped to 0 to 1: better counts 0.

    Args:
        early: quality of the policy's answers, higher is better: a score, or minus nats.
        full: of the full model's.
        scale: the loss of quality that counts 1, in the unit of the two.

    Raises:
        ValueError: `scale` is not positive, or a quality is not finite.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be above 0 and finite")
    if not (np.isfinite(early).all() and np.isfinite(full).all()):
        raise ValueError("early and full hold a quality that is not finite")
    return np.clip((full.astype(np.float64) - early.astype(np.float64)) / scale, 0, 1)


def wrong_only_early(
    early: Int[np.ndarray, " n"], full: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """1 where the policy is wrong and the full model right, else 0."""
    return ((early != labels) & (full == labels)).astype(np.float64)
