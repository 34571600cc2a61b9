"""Training a classifier, and its accuracy at every exit."""

import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from ...models import ClassifierModel, Layout
from ..data.examples import Examples, choosing_half, evaluation_batches
from ..data.pipeline import shuffled_examples
from ..experiment import FREE_FIELDS
from ..places import Place, check_place
from ..run_directory import RunDirectory
from ..training.loop import Evaluation, exit_status, run_loop
from ..training.process_rows import process_rows
from ..training.restore import one_device, restore_weights
from ..training.step import Trainer, TrainState, build_trainer, to_device
from .experiment import ClassificationExperiment, check_fits
from .task import classification_task

METRIC = "error"
"""By which a checkpoint is the best: share that the last exit gets wrong of half of the validation split."""
EVALUATED_AT_ONCE = 512
"""Examples of a batch in evaluation."""


class Accuracies(NamedTuple):
    """On some examples, of each exit."""

    depths: tuple[int, ...]
    """Layers before each exit."""
    accuracy: tuple[float, ...]
    nats: tuple[float, ...]
    """Mean negative log-likelihood of the right class."""
    examples: int

    @property
    def said(self) -> str:
        """For a person."""
        each = ", ".join(f"{share:.2%} after {depth}" for share, depth in zip(self.accuracy, self.depths, strict=True))
        return f"accuracy {each} layers, on {self.examples:,} examples"


class ClassificationResult(NamedTuple):
    """How a run ended."""

    path: Place
    step: int
    trainer: Trainer
    state: TrainState
    interrupted: signal.Signals | None

    @property
    def exit_status(self) -> int:
        """See `loop.exit_status`."""
        return exit_status(self.interrupted)


def train_classifier(
    experiment: ClassificationExperiment, path: Place, *, recipe: Path | None = None, console: Console | None = None
) -> ClassificationResult:
    """Train a classifier in a run directory, or continue the run that is there.

    Args:
        experiment: what to train.
        path: the run's directory; new, empty, or of this very experiment.
        recipe: the recipe file that built the experiment, kept with the run.
        console: where to print.

    Raises:
        ValueError: something does not fit, before anything is written.
        NonFinite: the loss or a gradient is not finite.
        DamagedCheckpoint, FailedSave: see `training/checkpoints.py`.
    """
    path = check_place(path)
    check_fits(experiment)
    layout = Layout(experiment.mesh.build(), experiment.rules)
    layout.batch(experiment.batch_size // experiment.gradient_accumulation, 2)
    trainer = classification_trainer(experiment, layout)
    rows = process_rows(layout, experiment.batch_size)
    batches = shuffled_examples(
        experiment.source.examples("train"), batch_size=experiment.batch_size, seed=experiment.seed, rows=rows
    )
    validation = choosing_half(experiment.source.examples("validation"))
    facts = {"source": experiment.source.describe()}
    directory = RunDirectory.open(path, experiment, recipe, facts, FREE_FIELDS, fixed_facts=("source",))

    def evaluate(state: TrainState) -> Evaluation:
        found = accuracies(experiment, trainer, state, validation)
        each = {f"accuracy_after_{depth}": share for depth, share in zip(found.depths, found.accuracy, strict=True)}
        return Evaluation({METRIC: 1 - found.accuracy[-1], "nats": found.nats[-1], **each}, found.said)

    outcome = run_loop(
        experiment,
        directory,
        trainer,
        batches,
        evaluate,
        metric=METRIC,
        unit="examples",
        units_per_step=experiment.batch_size,
        console=console or Console(),
    )
    return ClassificationResult(directory.path, outcome.step, trainer, outcome.state, outcome.interrupted)


def classification_trainer(experiment: ClassificationExperiment, layout: Layout) -> Trainer:
    """The functions of an experiment's training."""
    return build_trainer(
        experiment.model,
        experiment.optimizer,
        layout,
        steps=experiment.steps,
        accumulation=experiment.gradient_accumulation,
        task=classification_task(experiment.augmentation, experiment.label_smoothing),
    )


def accuracies(
    experiment: ClassificationExperiment, trainer: Trainer, state: TrainState, examples: Examples
) -> Accuracies:
    """Of every exit, on some examples; every process measures the same."""
    size = min(EVALUATED_AT_ONCE, -(-len(examples.labels) // trainer.layout.mesh.size) * trainer.layout.mesh.size)
    rows = process_rows(trainer.layout, size)
    totals = [
        trainer.evaluate(
            state.params, state.variables, to_device(Examples(*(part[rows] for part in batch)), trainer.layout)
        )
        for batch in evaluation_batches(examples, size)
    ]
    scores, counts = zip(*jax.device_get(totals), strict=True)
    count = int(np.sum(counts))
    nats = np.stack([score.nats for score in scores]).sum(axis=0, dtype=np.float64) / count
    correct = np.stack([score.correct for score in scores]).sum(axis=0) / count
    return Accuracies(experiment.model.exit_depths, tuple(correct.tolist()), tuple(nats.tolist()), count)


class TrainedClassifier(NamedTuple):
    """A classifier out of a run directory."""

    experiment: ClassificationExperiment
    trainer: Trainer
    state: TrainState
    """Its optimizer is none: `params` and `variables` alone were read."""
    step: int
    run: Place


def load_classifier(path: Place, step: int | None = None) -> TrainedClassifier:
    """Read the classifier of a run, on the first device.

    Args:
        path: the run's directory.
        step: which checkpoint; None: the best on the validation split, or the newest where none was measured.

    Raises:
        ValueError: there is no such run or checkpoint, or it is no classifier's.
        DamagedCheckpoint: its files are damaged.
    """
    directory = RunDirectory.load(path)
    experiment = directory.config
    if not isinstance(experiment, ClassificationExperiment):
        raise ValueError(f"{path} holds a {type(experiment).__name__}; it must be a ClassificationExperiment's run")
    trainer = classification_trainer(experiment, one_device())
    weights, step = restore_weights(directory, trainer, step, metric=METRIC)
    return TrainedClassifier(experiment, trainer, trainer.abstract_state._replace(**weights), step, directory.path)


def model_of(trained: TrainedClassifier) -> ClassifierModel:
    """The model of a run."""
    return nnx.merge(trained.trainer.graph, trained.state.params, trained.state.variables)
