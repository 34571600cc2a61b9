"""What leaving early buys and costs a classifier: a threshold with a guarantee from the validation split, and accuracy,
FLOPs and time of every threshold on the test split.

Letters: n examples, N exits, J thresholds.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ...dynamic import (
    Buckets,
    Confidence,
    Constant,
    ExitRun,
    Guarantee,
    Policy,
    Thresholds,
    fingerprint,
    learn_then_test,
    run_with_exits,
    wrong_only_early,
)
from ...kernels.flops import count_flops
from ...models import ClassifierModel, with_layers
from ...models.staged import staged, whole
from ..data.examples import Examples
from .timing import answers_of, equal_calls, timed

RISK = "share of answers wrong only because they were early"
UNIT = "examples"
QUARTERS = 4
"""Parts of equal size that examples are sorted into by how hard the full model finds them."""


class ClassifierPoint(NamedTuple):
    """One threshold on the test split; or the model of full depth, or another model."""

    name: str
    accuracy: float
    layers: float
    """Mean of an example."""
    flops: float
    """Mean of an example, heads of the exits that it met included, padding not."""
    padded_flops: float
    """The same with the padding of calls: what was computed."""
    seconds: float
    """Of an example, median of the rounds."""
    by_difficulty: tuple[float, ...]
    """Mean layers of the easiest to the hardest quarter of the examples, by the full model's loss."""
    threshold: float | None = None


class ClassifierSweep(NamedTuple):
    """The full model, other models, every threshold from the safest on, and what is guaranteed."""

    full: ClassifierPoint
    others: list[ClassifierPoint]
    points: list[ClassifierPoint]
    guarantee: Guarantee


class AtExits(NamedTuple):
    """Every exit's answers to the same examples."""

    prediction: Int[np.ndarray, "N n"]
    score: Float[np.ndarray, "early n"]
    """Of the exits before the last."""
    nats: Float[np.ndarray, " n"]
    """The last exit's loss."""

    def chosen(self, threshold: float) -> Int[np.ndarray, " n"]:
        """The exit that each example leaves at."""
        sure = self.score >= threshold
        return np.where(sure.any(axis=0), sure.argmax(axis=0), len(self.prediction) - 1)

    def answers(self, threshold: float) -> Int[np.ndarray, " n"]:
        """What each example is answered with."""
        return np.take_along_axis(self.prediction, self.chosen(threshold)[None], axis=0)[0]


def policy_record(model: ClassifierModel, confidence: Confidence) -> Policy:
    """Under what conditions answers are made, for a guarantee and its check."""
    return Policy(
        confidence=confidence.describe(),
        exits=model.config.exit_depths,
        thresholds="constant",
        keys_values="none",
        batch="each row",
        model=fingerprint(nnx.state(with_layers(model, stacked=False))),
    )


def calibrate(
    model: ClassifierModel,
    examples: Examples,
    confidence: Confidence,
    *,
    thresholds: Sequence[float],
    delta: float,
    epsilon: float,
    buckets: Buckets,
) -> Guarantee:
    """The lowest threshold by which answers are wrong only because they were early for a share of at most delta.

    Args:
        model: with exits.
        examples: which neither trained nor chose the model.
        confidence: scores the exits.
        thresholds: descending, fixed beforehand.
        delta: the share, in expectation.
        epsilon: chance that it does not hold.
        buckets: rows of a call.

    Raises:
        ValueError: the model has no exits, or there are too few examples for what is asked.
    """
    found = at_exits(model, examples, confidence, buckets)
    full, depths = found.prediction[-1], np.array(model.config.exit_depths)
    losses = [wrong_only_early(found.answers(threshold), full, examples.labels) for threshold in thresholds]
    return learn_then_test(
        np.stack(losses, axis=1),
        thresholds,
        policy=policy_record(model, confidence),
        risk=RISK,
        unit=UNIT,
        delta=delta,
        epsilon=epsilon,
        costs=np.stack([depths[found.chosen(threshold)] for threshold in thresholds], axis=1).astype(np.float64),
    )


def sweep(
    model: ClassifierModel,
    examples: Examples,
    guarantee: Guarantee,
    confidence: Confidence,
    *,
    thresholds: Sequence[float],
    others: Sequence[tuple[str, ClassifierModel]] = (),
    buckets: Buckets,
    rounds: int,
) -> ClassifierSweep:
    """Answer the examples by each threshold, by the full model and by other models, in turn, several times.

    Args:
        model: with exits.
        examples: of the test split.
        guarantee: of `calibrate`; its threshold is among those that are measured.
        confidence: scores the exits.
        thresholds: descending.
        others: models to compare with, by name.
        buckets: rows of a call; the full model and the others run in calls of the largest.
        rounds: of timing, after one that compiles.
    """
    known = at_exits(model, examples, confidence, buckets)
    quarters = np.array_split(np.argsort(known.nats, kind="stable"), QUARTERS)
    stages, costs, depths = staged(model), exit_flops(model), np.array(model.config.exit_depths)
    wanted = sorted({*thresholds, *_single(guarantee)}, reverse=True)

    def early(threshold: float) -> Callable[[], ExitRun]:
        policy = Constant(threshold=threshold)
        return lambda: run_with_exits(stages, examples.inputs, confidence, policy, buckets)

    plain = {"full model": model, **dict(others)}
    arms: dict[Any, Callable[[], Any]] = {
        name: answers_of(whole(each), examples, buckets) for name, each in plain.items()
    }
    arms |= {threshold: early(threshold) for threshold in wanted}
    answers, seconds = timed(arms, rounds)
    count = len(examples.labels)

    def plain_point(name: str, of: ClassifierModel) -> ClassifierPoint:
        flops, layers = plain_flops(of), float(of.config.layers)
        accuracy = float((answers[name] == examples.labels).mean())
        padded = flops * sum(map(len, equal_calls(examples, buckets))) / count
        return ClassifierPoint(name, accuracy, layers, flops, padded, seconds[name] / count, (layers,) * QUARTERS)

    points = []
    for threshold in wanted:
        run: ExitRun = answers[threshold]
        layers = depths[run.exit_index]
        paid = np.diff(costs, prepend=0.0)
        points.append(
            ClassifierPoint(
                f"{threshold:g}",
                float((run.prediction == examples.labels).mean()),
                float(layers.mean()),
                float(np.dot(run.rows, paid)) / count,
                float(np.dot(run.rows_with_padding, paid)) / count,
                seconds[threshold] / count,
                tuple(float(layers[quarter].mean()) for quarter in quarters),
                threshold,
            )
        )
    full, *rest = [plain_point(name, each) for name, each in plain.items()]
    return ClassifierSweep(full, rest, points, guarantee)


def answer_early(
    model: ClassifierModel, examples: Examples, confidence: Confidence, thresholds: Thresholds, buckets: Buckets
) -> tuple[ExitRun, float]:
    """Answers by one policy, and the seconds of a second time: in the first one all shapes are compiled."""
    stages = staged(model)
    run_with_exits(stages, examples.inputs, confidence, thresholds, buckets)
    begin = time.perf_counter()
    run = run_with_exits(stages, examples.inputs, confidence, thresholds, buckets)
    return run, time.perf_counter() - begin


def at_exits(model: ClassifierModel, examples: Examples, confidence: Confidence, buckets: Buckets) -> AtExits:
    """Ask every exit about every example.

    Raises:
        ValueError: the model has no exits.
    """
    if model.config.exits is None:
        raise ValueError(f"{type(model.config).__name__}.exits is None; leaving early needs a model trained with exits")
    graph, state = nnx.split(model)

    @jax.jit
    def ask(state: nnx.State, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = nnx.merge(graph, state)(inputs)
        memory, scores = confidence.initial(*output.pooled.shape[1:]), []
        for exit in range(len(output.logits) - 1):
            index = jnp.full((inputs.shape[0],), exit, jnp.int32)
            score, memory = confidence.score(index, output.logits[exit], output.pooled[exit], memory)
            scores.append(score)
        return output.logits, jnp.stack(scores)

    parts = [ask(state, inputs) for inputs in equal_calls(examples, buckets)]
    logits, scores = (np.concatenate([np.asarray(p) for p in part], axis=1) for part in zip(*parts, strict=True))
    logits, scores = logits[:, : len(examples.labels)], scores[:, : len(examples.labels)]
    nats = -np.asarray(jax.nn.log_softmax(logits[-1]))[np.arange(len(examples.labels)), examples.labels]
    return AtExits(logits.argmax(axis=2), scores, nats)


def exit_flops(model: ClassifierModel) -> Float[np.ndarray, " N"]:
    """FLOPs of matrix products of an example that leaves at each exit, with the heads that it met on the way."""
    unstacked, carried, flops = with_layers(model, stacked=False), model.config.example(1), []
    for exit in range(len(model.config.exit_depths)):
        jaxpr, shapes = jax.make_jaxpr(lambda given, exit=exit: unstacked.stage(exit, given), return_shape=True)(
            carried
        )
        flops.append(_counted(jaxpr))
        carried = shapes.carried
    return np.cumsum(flops)


def plain_flops(model: ClassifierModel) -> float:
    """The same of an example that goes to the end and meets the last head alone."""
    unstacked = with_layers(model, stacked=False)
    heads = sum(_counted(jax.make_jaxpr(unstacked.head, static_argnums=2)(*_entering(model), e)) for e in _early(model))
    return float(exit_flops(model)[-1]) - heads


def _early(model: ClassifierModel) -> range:
    return range(len(model.config.exit_depths) - 1)


def _entering(model: ClassifierModel) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What enters a head."""
    vectors = jax.eval_shape(model.embed, model.config.example(1))
    return vectors.x, vectors.real


def _counted(jaxpr: Any) -> float:
    flops = count_flops(jaxpr).flops
    return float("nan") if flops is None else flops


def _single(guarantee: Guarantee) -> list[float]:
    return [] if guarantee.threshold is None else [float(guarantee.threshold)]  # pyright: ignore[reportArgumentType]
