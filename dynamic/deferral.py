"""When a model of a cascade hands an input on to the next: rules that score its answer, higher where it may stay.

An answer stays where its score is at least the threshold. float64 NumPy on the host, once a model has answered.
Letters: R rows, V classes, S tokens of an answer, M members of an ensemble, D features.
"""

import abc
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


class Answers(NamedTuple):
    """What a model says about rows. A rule names what it needs of it; the rest may be None."""

    prediction: Shaped[Array | np.ndarray, "R ..."]
    """Classes [R] or tokens [R, S]."""
    logits: Float[Array | np.ndarray, "R V"] | None = None
    """Of a classifier."""
    token_log_probs: Float[Array | np.ndarray, "R S"] | None = None
    """Of a decoder: of each token that it chose, in nats."""
    counted: Bool[Array | np.ndarray, "R S"] | None = None
    """Tokens that are part of the answer; None: all."""
    votes: Int[Array | np.ndarray, "R M"] | None = None
    """Of an ensemble: the members' classes, or numbers that are equal where answers are."""
    features: Float[Array | np.ndarray, "R D"] | None = None
    """For a learned rule: anything known of an input once the model has answered."""


class Deferral(abc.ABC):
    """A rule. One of your own derives from this: a frozen dataclass."""

    @abc.abstractmethod
    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        """Scores 0 to 1, higher for answers that need no larger model.

        Raises:
            ValueError: the answers lack what the rule needs.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """The rule and its options in JSON's types."""


@dataclass(frozen=True, kw_only=True)
class MaxProbability(Deferral):
    """Probability of the most probable class; Chow's rule."""

    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        return _probabilities(self, answers).max(axis=1)

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__}


@dataclass(frozen=True, kw_only=True)
class Entropy(Deferral):
    """1 - H / log V of the classes."""

    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        p = _probabilities(self, answers)
        terms = p * np.log(np.where(p > 0, p, 1))
        return np.clip(1 + terms.sum(axis=1) / np.log(p.shape[1]), 0, 1)

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__}


@dataclass(frozen=True, kw_only=True)
class TokenQuantile(Deferral):
    """A quantile of the probabilities of an answer's tokens. Gupta et al. 2024, "Language Model Cascades: Token-Level
    Uncertainty and Beyond", https://arxiv.org/abs/2404.10136, section 3.3.

    A sum of log-probabilities prefers short answers and a mean long ones; a low quantile asks how sure the answer's
    least sure tokens are. The paper takes the quantile of log-probabilities; this is its exponential, the same order.
    """

    quantile: float = 0.0
    """0: of the least probable token; 0.5: the median."""

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"TokenQuantile.quantile is {self.quantile}; it must be 0 to 1")

    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        log_probs = np.asarray(_needed(self, answers, "token_log_probs"), np.float64)
        if answers.counted is not None:
            counted = np.asarray(answers.counted)
            if not counted.any(axis=1).all():
                raise ValueError(f"counted has no token of answer {int(np.argmin(counted.any(axis=1)))}")
            log_probs = np.where(counted, log_probs, np.nan)
        return np.exp(np.minimum(np.nanquantile(log_probs, self.quantile, axis=1), 0))

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Agreement(Deferral):
    """Share of an ensemble's members that voted for its most frequent answer. Kolawole et al. 2024,
    https://arxiv.org/abs/2407.02348."""

    def score(self, answers: Answers) -> Float[np.ndarray, " R"]:
        votes = np.asarray(_needed(self, answers, "votes"))
        return (votes[:, :, None] == votes[:, None, :]).sum(axis=2).max(axis=1) / votes.shape[1]

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__}


def _needed(rule: Deferral, answers: Answers, name: str) -> Any:
    if (value := getattr(answers, name)) is None:
        raise ValueError(f"answers.{name} is None; {type(rule).__name__} needs it")
    return value


def _probabilities(rule: Deferral, answers: Answers) -> Float[np.ndarray, "R V"]:
    logits = np.asarray(_needed(rule, answers, "logits"), np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
