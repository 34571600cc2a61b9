"""P-values for "the expected loss is above delta", from losses between 0 and 1. float64 throughout.

A p-value is small where the losses would be surprising if that were so: P(p <= u) <= u whenever the expectation is
above delta, with any n. Letters: n calibration units, J candidates.
"""

import abc
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


class PValue(abc.ABC):
    """A test of "the expected loss is above delta". One of your own derives from this: a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, losses: Float[np.ndarray, "n J"], delta: float, epsilon: float) -> Float[np.ndarray, " J"]:
        """One p-value of each candidate.

        Args:
            losses: of independent, equally distributed units.
            delta: the expected loss that is tested, above 0 and below 1.
            epsilon: what the p-values will be held against; they are valid whatever it is.
        """


@dataclass(frozen=True, kw_only=True)
class Hoeffding(PValue):
    """exp(-2 n (delta - mean)_+^2). Hoeffding 1963, theorem 1; the form that CALM states."""

    def __call__(self, losses: Float[np.ndarray, "n J"], delta: float, epsilon: float) -> Float[np.ndarray, " J"]:
        return np.exp(-2 * len(losses) * np.maximum(delta - losses.mean(axis=0), 0) ** 2)


@dataclass(frozen=True, kw_only=True)
class HoeffdingBentkus(PValue):
    """The smaller of exp(-n KL(mean, delta)) and e P(Binomial(n, delta) <= ceil(n mean)).

    Bates et al. 2021, https://arxiv.org/abs/2101.02703, and Angelopoulos et al. 2021 (Learn then Test),
    https://arxiv.org/abs/2110.01052, proposition 1. Near the exact test for losses that are 0 or 1, valid for all
    between.
    """

    def __call__(self, losses: Float[np.ndarray, "n J"], delta: float, epsilon: float) -> Float[np.ndarray, " J"]:
        n, mean = len(losses), losses.mean(axis=0)
        return np.minimum(np.exp(-n * _divergence(np.minimum(mean, delta), delta)), self._bentkus(n, mean, delta))

    @staticmethod
    def _bentkus(n: int, mean: Float[np.ndarray, " J"], delta: float) -> Float[np.ndarray, " J"]:
        total = n * mean
        whole = np.rint(total)
        # A sum of losses of 0 and 1 is whole, but its mean times n may come out a little above.
        at_most = np.where(np.abs(total - whole) <= 1e-12 * n, whole, np.ceil(total)).astype(int)
        return np.exp(np.minimum(1 + log_binomial_tails(n, delta)[at_most], 0))


@dataclass(frozen=True, kw_only=True)
class Betting(PValue):
    """1 over the greatest wealth of a gambler who bets that the losses are lower than delta.

    Waudby-Smith and Ramdas 2020, https://arxiv.org/abs/2010.09686; the bets are those of Bates et al. 2021, proposition
    5. It profits from a small variance, as no bound from the mean alone can. Depends on the order of the units, which
    must be theirs by chance.
    """

    def __call__(self, losses: Float[np.ndarray, "n J"], delta: float, epsilon: float) -> Float[np.ndarray, " J"]:
        n, count = len(losses), np.arange(2, len(losses) + 2)[:, None]
        mean = (0.5 + np.cumsum(losses, axis=0)) / count
        variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=0)) / count
        before = np.concatenate([np.full_like(variance[:1], 0.25), variance[:-1]])
        bets = np.minimum(1, np.sqrt(2 * math.log(1 / epsilon) / (n * before)))
        wealth = np.cumsum(np.log1p(-bets * (losses - delta)), axis=0)
        return np.exp(np.minimum(-wealth.max(axis=0), 0))


def log_binomial_tails(n: int, probability: float) -> Float[np.ndarray, " counts"]:
    """log P(Binomial(n, probability) <= k) for k = 0, ..., n.

    Sums of terms that are never negative, so no digits cancel.

    Args:
        n: at least 1.
        probability: above 0 and below 1.
    """
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    terms = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    terms += k * math.log(probability) + (n - k) * math.log1p(-probability)
    return np.minimum(np.logaddexp.accumulate(terms), 0)


def _divergence(a: Float[np.ndarray, " J"], b: float) -> Float[np.ndarray, " J"]:
    """KL of coins with chances a and b in nats, where 0 log 0 is 0."""
    heads = a * np.log(np.where(a > 0, a, 1) / b)
    return heads + (1 - a) * np.log(np.where(a < 1, 1 - a, 1) / (1 - b))
