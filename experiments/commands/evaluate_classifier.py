"""`dynamoe evaluate` on the run of a classifier: accuracy at every exit, a sweep of thresholds, or one policy."""

from pathlib import Path

import numpy as np
from rich.console import Console

from ...dynamic import Buckets, Constant, Thresholds, Top2Gap
from ...models import ClassifierModel
from ..classification.exit_plot import plot_classifier_sweep
from ..classification.exit_sweep import ClassifierSweep, answer_early, calibrate, policy_record, sweep
from ..classification.train import TrainedClassifier, accuracies, load_classifier, model_of
from ..data.examples import calibration_half
from ..files import write_atomically
from ..page import Table
from ..places import Place
from ..tables import for_terminal
from .cascade_option import CascadeOptions, run_cascade
from .early_exit_option import CALIBRATED, GUARANTEE, read_guarantee, threshold_of
from .sweep_thresholds import PICTURE, THRESHOLDS, SweepOptions

BUCKETS = Buckets(smallest=8, largest=512)
ROUNDS = 5


def evaluate_classifier(
    run: Place,
    checkpoint: int | None,
    console: Console,
    *,
    early_exit: str | None = None,
    options: SweepOptions | None = None,
    cascade: CascadeOptions | None = None,
) -> int:
    """Measure a classifier on its test split.

    Args:
        run: its directory.
        checkpoint: which; None: the best.
        console: where to print.
        early_exit: a threshold, or "calibrated"; None: every exit by itself.
        options: of a sweep; None: none is asked for.
        cascade: of a cascade that begins with this model; None: none is asked for.

    Raises:
        ValueError: the model has no exits, too few examples for the guarantee, or the guarantee is for other answers.
    """
    trained = load_classifier(run, checkpoint)
    if options is not None:
        return _sweep(trained, options, console)
    if cascade is not None:
        return run_cascade(trained, cascade, BUCKETS, ROUNDS, console)
    test = trained.experiment.source.examples("test")
    if early_exit is None:
        said = accuracies(trained.experiment, trained.trainer, trained.state, test).said
        console.print(f"test, at step {trained.step}: {said}", markup=False, highlight=False)
        return 0
    model = model_of(trained)
    found, seconds = answer_early(model, test, Top2Gap(), _thresholds(early_exit, model, trained.run), BUCKETS)
    layers = np.array(model.config.exit_depths)[found.exit_index].mean()
    console.print(
        f"test, early exit {early_exit}: accuracy {(found.prediction == test.labels).mean():.2%}, {layers:.2f} of "
        f"{model.config.layers} layers, {seconds / len(test.labels) * 1e6:.1f} us an example; rows at each exit "
        f"{found.rows}, with padding {found.rows_with_padding}",
        markup=False,
        highlight=False,
    )
    return 0


def _thresholds(text: str, model: ClassifierModel, run: Place) -> Thresholds:
    if text != CALIBRATED:
        return Constant(threshold=threshold_of(text))
    return read_guarantee(run).thresholds_for(policy_record(model, Top2Gap()))


def _sweep(trained: TrainedClassifier, options: SweepOptions, console: Console) -> int:
    model, source = model_of(trained), trained.experiment.source
    others = [(Path(str(run)).name, model_of(load_classifier(run))) for run in options.beside]
    guarantee = calibrate(
        model,
        calibration_half(source.examples("validation")),
        Top2Gap(),
        thresholds=THRESHOLDS,
        delta=options.delta,
        epsilon=options.epsilon,
        buckets=BUCKETS,
    )
    found = sweep(
        model,
        source.examples("test"),
        guarantee,
        Top2Gap(),
        thresholds=THRESHOLDS,
        others=others,
        buckets=BUCKETS,
        rounds=ROUNDS,
    )
    console.print(for_terminal(classifier_table(found)))
    console.print(guarantee.statement, markup=False, highlight=False)
    try:
        write_atomically(trained.run / GUARANTEE, guarantee.to_json())
        picture = plot_classifier_sweep(found, trained.run / PICTURE)
    except PermissionError as error:  # a run of somebody else's
        console.print(f"nothing is written, the run cannot be written to: {error}", markup=False)
        return 0
    for file in (trained.run / GUARANTEE, picture):
        console.print(str(Path(file)), markup=False, highlight=False)
    return 0


def classifier_table(found: ClassifierSweep) -> Table:
    """A line for each model and threshold; costs are those of the full model = 1."""
    full = found.full
    rows = [
        (
            f"{point.name} *" if point.threshold is not None and point.threshold == chosen else point.name,
            f"{point.accuracy:.2%}",
            f"{point.layers:.2f}",
            f"{point.flops / full.flops:.3f}",
            f"{point.padded_flops / full.padded_flops:.3f}",
            f"{point.seconds / full.seconds:.3f}",
            " ".join(f"{layers:.2f}" for layers in point.by_difficulty),
        )
        for chosen in [found.guarantee.threshold]
        for point in [full, *found.others, *found.points]
    ]
    columns = ("threshold", "accuracy", "layers", "FLOPs", "with padding", "time", "layers by difficulty")
    caption = (
        f"The test split, in calls of at most {BUCKETS.largest} rows. FLOPs and time of an example over those of the "
        "full model with its last head alone; layers of the easiest to the hardest quarter of the examples, by the "
        "full model's loss. * calibrated on the half of the validation split that chose no checkpoint."
    )
    return Table(columns, rows, caption)
