"""Cascades: a cheap model answers first, and hands on to a dearer one what its rule is not sure of.

    cascade = Cascade(models=(small, large), rules=(MaxProbability(),), unit="FLOPs")
    cascade.run(inputs, (0.9,))

The dearer model really sees the deferred inputs alone: the host compacts them into buckets. Letters: B and n rows,
m models, J candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from .buckets import Buckets, run_in_buckets
from .deferral import Answers, Deferral
from .thresholds import check_threshold


@runtime_checkable
class CascadeModel(Protocol):
    """A model of a cascade: a classifier, a decoder with its generation, an ensemble, dense or not."""

    name: str
    cost: float
    """Of one input, in the unit of the cascade."""

    def __call__(self, inputs: Any) -> Answers:
        """Answers to a pytree of arrays [R, ...]. What it says of a row must not depend on the others."""
        ...


class CascadeRun(NamedTuple):
    """Answers and what they took."""

    prediction: Shaped[np.ndarray, "B ..."]
    model: Int[np.ndarray, " B"]
    """Whose answer it is, from 0."""
    rows: list[int]
    """That each model was asked about; 0 where none was left."""
    rows_with_padding: list[int]
    """That each model computed."""
    cost: float
    """Mean of a row, in the cascade's unit, padding not counted."""
    cost_with_padding: float
    """Mean of a row, what was really computed."""


class Outcomes(NamedTuple):
    """Every model's answers to the same rows, from which any thresholds can be judged without asking again."""

    predictions: list[Shaped[np.ndarray, "n ..."]]
    """Of each model."""
    scores: Float[np.ndarray, "n rules"]
    """Of each model's answers but the last's."""


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Any number of models, from the cheapest to the dearest."""

    models: tuple[CascadeModel, ...]
    rules: tuple[Deferral, ...]
    """One of each model but the last."""
    unit: str
    """Of the costs: "FLOPs", "seconds", "dollars"."""
    buckets: Buckets = Buckets()

    def __post_init__(self):
        if len(self.models) < 2 or len(self.rules) != len(self.models) - 1:
            raise ValueError(
                f"Cascade.models has {len(self.models)} and Cascade.rules {len(self.rules)}; there must be two models "
                "or more, and a rule of each but the last"
            )
        costs = [model.cost for model in self.models]
        if costs[0] < 0 or any(not a < b < np.inf for a, b in zip(costs, costs[1:], strict=False)):
            raise ValueError(f"Cascade.models cost {costs} {self.unit}; costs must ascend from 0 or more and be finite")

    @property
    def paid(self) -> Float[np.ndarray, " m"]:
        """Cost of an input that ends at each model: all before it have been asked too."""
        return np.cumsum([float(model.cost) for model in self.models])

    def describe(self) -> dict[str, Any]:
        """Models by name and rules, in JSON's types, for `Policy.confidence`."""
        return {"models": [model.name for model in self.models], "rules": [rule.describe() for rule in self.rules]}

    def run(self, inputs: Any, thresholds: Sequence[float] | None) -> CascadeRun:
        """Answer inputs.

        Args:
            inputs: pytree of arrays [B, ...].
            thresholds: 0 to 1, one of each model but the last; an answer that scores at least that stays. inf: all are
                handed on. None: the last model alone is asked, the `Guarantee.threshold` where nothing passed.

        Raises:
            ValueError: their number or range is wrong, or models answer in different shapes.
        """
        last = len(self.rules)
        check_thresholds(thresholds, last)
        left = np.arange(jax.tree.leaves(inputs)[0].shape[0])
        count = len(left)
        model_of, prediction = np.zeros(count, np.int64), None
        rows, padded = [], []
        for at, model in enumerate(self.models):
            asked = 0 if thresholds is None and at < last else len(left)
            rows.append(asked)
            padded.append(0)
            if not asked:
                continue
            answers, sizes = run_in_buckets(model, inputs, left, self.buckets)
            padded[-1] = sum(sizes)
            answers = _on_host(answers, len(left))
            form = (answers.prediction.shape[1:], answers.prediction.dtype)
            if prediction is None:
                prediction = np.zeros((count, *form[0]), form[1])
            if form != (prediction.shape[1:], prediction.dtype):
                raise ValueError(
                    f"{model.name} answers in {form[1]}{list(form[0])} a row; the models before it in "
                    f"{prediction.dtype}{list(prediction.shape[1:])}, and all must in the same"
                )
            stays = self._stays(at, answers, thresholds)
            prediction[left[stays]], model_of[left[stays]] = answers.prediction[stays], at
            left = left[~stays]
        if prediction is None:
            raise ValueError("inputs has no rows")
        cost, with_padding = (sum(n * m.cost for n, m in zip(ns, self.models, strict=True)) for ns in (rows, padded))
        return CascadeRun(prediction, model_of, rows, padded, cost / count, with_padding / count)

    def _stays(self, at: int, answers: Answers, thresholds: Sequence[float] | None) -> np.ndarray:
        if thresholds is None or at == len(self.rules):
            return np.ones(len(answers.prediction), bool)
        return self.rules[at].score(answers) >= thresholds[at]

    def outcomes(self, inputs: Any) -> Outcomes:
        """Ask every model about every row: for calibration and curves."""
        everything = np.arange(jax.tree.leaves(inputs)[0].shape[0])
        predictions, scores = [], []
        for at, model in enumerate(self.models):
            answers = _on_host(run_in_buckets(model, inputs, everything, self.buckets).outputs, len(everything))
            predictions.append(answers.prediction)
            if at < len(self.rules):
                scores.append(self.rules[at].score(answers))
        return Outcomes(predictions, np.stack(scores, axis=1))


def chosen_models(
    scores: Float[np.ndarray, "n rules"], candidates: Float[np.ndarray, "J rules"]
) -> Int[np.ndarray, "n J"]:
    """Whose answer each row gets under each candidate's thresholds: the first model whose score reaches its own."""
    stays = scores[:, None, :] >= candidates[None]
    return np.where(stays.any(axis=2), stays.argmax(axis=2), scores.shape[1])


def of_chosen(values: Float[np.ndarray, "n m"], chosen: Int[np.ndarray, "n J"]) -> Float[np.ndarray, "n J"]:
    """A value of each model's answer to each row (a loss, a quality), for the answers that candidates give: the losses
    of `learn_then_test`."""
    return np.take_along_axis(values, chosen, axis=1)


def thresholds_by_level(scores: Float[np.ndarray, "n rules"], levels: Sequence[float]) -> Float[np.ndarray, "J rules"]:
    """Candidates for any number of models along one line: at level q each rule's threshold is the q-quantile of its own
    scores, so that about a share q is handed on; at level 1 it is inf, and all are.

    Levels descend, from the safest. For a guarantee take levels below 1, and scores of other rows than those that it is
    calibrated on: candidates must be fixed beforehand.
    """
    if not len(levels) or any(not 0 <= level <= 1 for level in levels) or list(levels) != sorted(levels, reverse=True):
        raise ValueError(f"levels is {list(levels)}; they must descend and lie between 0 and 1")
    quantiles = np.quantile(scores, np.array(levels), axis=0)
    return np.where(np.array(levels)[:, None] == 1, np.inf, quantiles)


def check_thresholds(thresholds: Sequence[float] | None, rules: int) -> None:
    """
    Raises:
        ValueError: there is not one of each rule, or one is neither between 0 and 1 nor inf.
    """
    if thresholds is None:
        return
    if len(thresholds) != rules:
        raise ValueError(f"thresholds has {len(thresholds)}; the cascade has {rules} rules and needs one of each")
    for threshold in thresholds:
        if threshold != np.inf:
            check_threshold("thresholds", threshold)


def _on_host(answers: Answers, rows: int) -> Answers:
    return jax.tree.map(lambda array: np.asarray(array)[:rows], answers)
