"""`dynamoe evaluate --cascade.behind RUN …`: small classifiers first, what each threshold costs and answers."""

import dataclasses
from pathlib import Path

from rich.console import Console

from ...dynamic import Buckets
from ..classification.cascade import MeasuredCascade, Unit, build_cascade, measure_cascade
from ..classification.train import TrainedClassifier, load_classifier, model_of
from ..data.examples import calibration_half
from ..files import write_atomically
from ..page import Table
from ..tables import for_terminal
from .place_option import PlaceOption

CASCADE = "cascade.json"
"""Beside the first model's run: what was calibrated."""
THRESHOLDS = (0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the most probable class, fixed beforehand, from the safest on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeOptions:
    """A cascade of classifiers."""

    behind: tuple[PlaceOption, ...] = ()
    """Runs that answer what the model of --run-dir is not sure of, the dearest last. None: no cascade."""
    unit: Unit = "FLOPs"
    """Of the costs: counted, measured, or --cascade.prices."""
    prices: tuple[float, ...] = ()
    """Of an example at each model, that of --run-dir first, in money."""
    delta: float = 0.05
    """Share of the examples that may be wrong only because a smaller model answered."""
    epsilon: float = 0.05
    """Chance that the guarantee does not hold."""


def run_cascade(
    first: TrainedClassifier, options: CascadeOptions, buckets: Buckets, rounds: int, console: Console
) -> int:
    """Measure a cascade on the test split, calibrate it, and write the guarantee beside the first run.

    Raises:
        ValueError: runs have other classes or sources, or an option is out of its bounds.
    """
    members = [first, *(load_classifier(run) for run in options.behind)]
    for each in members[1:]:
        if each.experiment.source != first.experiment.source:
            raise ValueError(
                f"cascade.behind: {each.run} was trained on {each.experiment.source}; {first.run} on "
                f"{first.experiment.source}, and all must have the same examples"
            )
    models = [(Path(str(each.run)).name, model_of(each)) for each in members]
    source, half = first.experiment.source, calibration_half(first.experiment.source.examples("validation"))
    cascade = build_cascade(models, half, unit=options.unit, prices=options.prices, buckets=buckets, rounds=rounds)
    found = measure_cascade(
        cascade,
        models,
        half,
        source.examples("test"),
        thresholds=THRESHOLDS,
        delta=options.delta,
        epsilon=options.epsilon,
        rounds=rounds,
    )
    console.print(for_terminal(cascade_table(found)))
    curve = found.curve
    console.print(
        f"area of accuracy between the cheapest and the dearest model: {curve.area:.4f}; choosing between the two by "
        f"chance gives {curve.random_area:.4f}",
        highlight=False,
    )
    console.print(found.guarantee.statement, markup=False, highlight=False)
    try:
        write_atomically(first.run / CASCADE, found.guarantee.to_json())
        console.print(str(first.run / CASCADE), markup=False, highlight=False)
    except PermissionError as error:  # a run of somebody else's
        console.print(f"nothing is written, the run cannot be written to: {error}", markup=False)
    return 0


def cascade_table(found: MeasuredCascade) -> Table:
    """A line for each model alone and each threshold; costs and time are those of the dearest model = 1."""
    cascade, curve = found.cascade, found.curve
    dearest, slowest = curve.model_cost[-1], found.seconds[-1]
    rows = [
        (model.name, f"{curve.model_quality[n]:.2%}", f"{curve.model_cost[n] / dearest:.3f}")
        + (f"{found.seconds[n] / slowest:.3f}", "alone")
        for n, model in enumerate(cascade.models)
    ]
    rows += [
        (
            f"{point.thresholds[0]:g}" + (" *" if point.thresholds == found.guarantee.threshold else ""),
            f"{point.accuracy:.2%}",
            f"{point.cost / dearest:.3f}",
            f"{point.seconds / slowest:.3f}",
            " ".join(f"{share:.1%}" for share in point.shares),
        )
        for point in found.points
    ]
    caption = (
        f"The test split. Costs in {cascade.unit} and time of an example over those of {cascade.models[-1].name}; the "
        "last column: share of the examples that each model was asked about. * calibrated on the half of the "
        "validation split that chose no checkpoint."
    )
    return Table(("threshold", "accuracy", "cost", "time", "asked"), rows, caption)
