"""A trained model out of a run directory."""

from typing import NamedTuple

import jax
from flax import nnx

from ...models import DecoderLM, Layout, MeshShape
from ..experiment import Experiment
from ..places import Place
from ..run_directory import RunDirectory, is_quantized
from .checkpoints import Checkpoints
from .quantized_run import load_quantized_run
from .step import Trainer, build_evaluate, build_trainer

METRIC = "bits_per_byte"
"""The measurement by which a checkpoint is the best: held-out bits per byte."""


class Trained(NamedTuple):
    """A run's model on one device."""

    experiment: Experiment
    trainer: Trainer
    params: nnx.State
    variables: nnx.State
    step: int
    """The checkpoint's step."""

    @property
    def model(self) -> DecoderLM:
        return nnx.merge(self.trainer.graph, self.params, self.variables)


def load_trained(path: Place, step: int | None = None) -> Trained:
    """Read the model of a run, on the first device: a trained one, or one that `dynamoe compress` packed.

    Args:
        path: the run's directory.
        step: which checkpoint; None: the best, or the newest where none was measured.

    Raises:
        ValueError: there is no such run or checkpoint.
        DamagedCheckpoint: its files are damaged.
    """
    directory = RunDirectory.load(path)
    experiment = directory.config
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} holds a {type(experiment).__name__}; it must be the run of an Experiment")
    layout = Layout(MeshShape(data=1).build(jax.local_devices()[:1]))
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=experiment.steps)
    if is_quantized(directory.path):
        model, packed_step = load_quantized_run(directory.path, experiment.model)
        if step not in (None, packed_step):
            raise ValueError(f"checkpoint is {step}; {path} holds the packed weights of step {packed_step} alone")
        return packed_as_trained(experiment, trainer, model, packed_step)
    weights, step = restore_weights(directory, trainer, step)
    return Trained(experiment, trainer, weights["params"], weights["variables"], step)


def packed_as_trained(experiment: Experiment, trainer: Trainer, model: DecoderLM, step: int) -> Trained:
    """A model with packed weights, to evaluate and to generate from; its trainer evaluates it and cannot train it."""
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    trainer = trainer._replace(graph=graph, evaluate=build_evaluate(graph, trainer.layout))
    return Trained(experiment, trainer, params, variables, step)


def restore_weights(
    directory: RunDirectory, trainer: Trainer, step: int | None = None
) -> tuple[dict[str, nnx.State], int]:
    """The `params` and `variables` of a run's checkpoint and its step, sharded as the trainer's; see `load_trained`."""
    abstract = trainer.abstract_state
    with Checkpoints(directory.checkpoints, metric=METRIC, read_only=True) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        return checkpoints.restore_part({"params": abstract.params, "variables": abstract.variables}, step)
