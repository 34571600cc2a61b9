"""A cascade of trained classifiers: what each threshold costs and answers, beside every model alone.

Letters: n examples, m models, J thresholds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from ...dynamic import (
    Answers,
    Buckets,
    Cascade,
    CascadeModel,
    Curve,
    Guarantee,
    MaxProbability,
    Policy,
    cascade_curve,
    chosen_models,
    fingerprint,
    learn_then_test,
    of_chosen,
    wrong_only_early,
)
from ...models import ClassifierModel, with_layers
from ...models.layer_stack import refuse_batch_dependence
from ...models.staged import whole
from ..data.examples import Examples
from .exit_sweep import plain_flops
from .timing import answers_of, timed

Unit = Literal["FLOPs", "seconds", "money"]
RISK = "share of answers wrong only because a smaller model gave them"


@dataclass
class TrainedModel:
    """A trained classifier as a model of a cascade."""

    name: str
    cost: float
    """Of one example."""
    run: Any
    """From inputs to logits, jitted."""

    def __call__(self, inputs: Any) -> Answers:
        logits = self.run(jnp.asarray(inputs))
        return Answers(logits.argmax(axis=1), logits=logits)


class CascadePoint(NamedTuple):
    """One threshold on the test split."""

    thresholds: tuple[float, ...]
    """Of each model but the last."""
    accuracy: float
    cost: float
    """Mean of an example, padding not counted."""
    seconds: float
    """Of an example, median of the rounds."""
    shares: tuple[float, ...]
    """Of the examples that each model was asked about."""


class MeasuredCascade(NamedTuple):
    """A cascade, each model alone, and every threshold."""

    cascade: Cascade
    seconds: tuple[float, ...]
    """Of an example, of each model alone."""
    curve: Curve
    """Over these thresholds, and one that hands nothing on."""
    points: list[CascadePoint]
    guarantee: Guarantee


def build_cascade(
    models: Sequence[tuple[str, ClassifierModel]],
    examples: Examples,
    *,
    unit: Unit,
    prices: Sequence[float] = (),
    buckets: Buckets,
    rounds: int,
) -> Cascade:
    """A cascade that hands on where the most probable class is not probable enough.

    Args:
        models: by name, from the cheapest to the dearest.
        examples: that seconds are measured on.
        unit: of the costs: counted FLOPs, measured seconds, or money, by `prices`.
        prices: of an example at each model.
        buckets: rows of a call.
        rounds: of timing.

    Raises:
        ValueError: there is not one price of each model, or costs do not ascend; a model's answer to a row depends on
            the others.
    """
    if (unit == "money") != bool(prices) or (prices and len(prices) != len(models)):
        raise ValueError(
            f"prices is {tuple(prices)} and unit {unit!r}; money takes one of each of {len(models)} models"
        )
    for _, model in models:
        refuse_batch_dependence(model.config, None)
    runs = [whole(model) for _, model in models]
    costs: Sequence[float] = prices
    if unit == "FLOPs":
        costs = [plain_flops(model) for _, model in models]
    elif unit == "seconds":
        _, seconds = timed({n: answers_of(run, examples, buckets) for n, run in enumerate(runs)}, rounds)
        costs = [each / len(examples.labels) for each in seconds.values()]
    names = [name for name, _ in models]
    members = tuple(map(TrainedModel, names, map(float, costs), runs))
    return Cascade(models=members, rules=(MaxProbability(),) * (len(models) - 1), unit=unit, buckets=buckets)


def measure_cascade(
    cascade: Cascade,
    models: Sequence[tuple[str, ClassifierModel]],
    calibration: Examples,
    test: Examples,
    *,
    thresholds: Sequence[float],
    delta: float,
    epsilon: float,
    rounds: int,
) -> MeasuredCascade:
    """Calibrate one threshold of all rules, and answer the test split at each.

    Args:
        cascade: of `build_cascade`.
        models: the same, for their fingerprints.
        calibration: examples that neither trained nor chose a model.
        test: the test split.
        thresholds: descending, fixed beforehand.
        delta: share of answers that may be wrong only because a smaller model gave them, in expectation.
        epsilon: chance that it does not hold.
        rounds: of timing.
    """
    count, candidates = len(test.labels), _for_all_rules(thresholds, cascade)
    guarantee = _calibrate(cascade, models, calibration, thresholds, delta, epsilon)
    outcomes = cascade.outcomes(test.inputs)
    quality = np.stack([prediction == test.labels for prediction in outcomes.predictions], axis=1).astype(np.float64)
    costs = np.array([model.cost for model in cascade.models])
    curve = cascade_curve(outcomes.scores, quality, costs, np.concatenate([candidates, np.zeros_like(candidates[:1])]))
    arms: dict[Any, Any] = {each: partial(cascade.run, test.inputs, each) for each in map(tuple, candidates.tolist())}
    arms |= {n: answers_of(_logits(model), test, cascade.buckets) for n, model in enumerate(cascade.models)}
    runs, seconds = timed(arms, rounds)
    points = [
        CascadePoint(
            thresholds=each,
            accuracy=float((runs[each].prediction == test.labels).mean()),
            cost=runs[each].cost,
            seconds=seconds[each] / count,
            shares=tuple(rows / count for rows in runs[each].rows),
        )
        for each in arms
        if isinstance(each, tuple)
    ]
    alone = tuple(seconds[n] / count for n in range(len(models)))
    return MeasuredCascade(cascade, alone, curve, points, guarantee)


def _logits(model: CascadeModel) -> Callable[[Any], Any]:
    return lambda inputs: model(inputs).logits


def _calibrate(
    cascade: Cascade,
    models: Sequence[tuple[str, ClassifierModel]],
    examples: Examples,
    thresholds: Sequence[float],
    delta: float,
    epsilon: float,
) -> Guarantee:
    outcomes = cascade.outcomes(examples.inputs)
    chosen = chosen_models(outcomes.scores, _for_all_rules(thresholds, cascade))
    losses = [wrong_only_early(found, outcomes.predictions[-1], examples.labels) for found in outcomes.predictions]
    rules = len(cascade.rules)
    return learn_then_test(
        of_chosen(np.stack(losses, axis=1), chosen),
        [(threshold,) * rules for threshold in thresholds],
        policy=Policy(
            confidence=cascade.describe(),
            exits=tuple(range(len(models))),
            thresholds="of each model but the last",
            keys_values="none",
            batch="each row",
            model=fingerprint([nnx.state(with_layers(model, stacked=False)) for _, model in models]),
        ),
        risk=RISK,
        unit="examples",
        delta=delta,
        epsilon=epsilon,
        costs=cascade.paid[chosen],
    )


def _for_all_rules(thresholds: Sequence[float], cascade: Cascade) -> Float[np.ndarray, "J rules"]:
    return np.repeat(np.array(thresholds, np.float64)[:, None], len(cascade.rules), axis=1)
