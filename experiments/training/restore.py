"""A trained model out of a run directory."""

from typing import NamedTuple

import jax
from flax import nnx

from ...models import DecoderLM, Layout, MeshShape
from ...models.checkpoints import Pretrained
from ..data import HeldOut
from ..experiment import Experiment
from ..places import Place
from ..run_directory import RunDirectory, is_quantized
from .checkpoints import Checkpoints
from .evaluation import bits_per_byte, total_nats
from .quantized_run import load_quantized_run
from .step import Evaluate, Trainer, build_evaluate, build_trainer

METRIC = "bits_per_byte"
"""The measurement by which a checkpoint is the best: held-out bits per byte."""


class Trained(NamedTuple):
    """A model with what measures it: of a run, or published."""

    experiment: Experiment
    graph: nnx.GraphDef
    params: nnx.State
    variables: nnx.State
    layout: Layout
    evaluate: Evaluate
    step: int
    """The checkpoint's step; 0 of a published model."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer, besides the tokenizer's own."""
    pretrained: Pretrained | None = None
    """Of a published model: what saving it again needs."""
    run: Place | None = None
    """The directory of a run."""

    @property
    def model(self) -> DecoderLM:
        return nnx.merge(self.graph, self.params, self.variables)

    def nats(self, text: HeldOut) -> float:
        """Sum of the negative log-likelihoods of a text's targets."""
        return total_nats(self.evaluate, self.params, self.variables, text, self.layout)

    def bits_per_byte(self, text: HeldOut) -> float:
        """See `evaluation.bits_per_byte`."""
        return bits_per_byte(self.evaluate, self.params, self.variables, text, self.layout)


def as_trained(experiment: Experiment, trainer: Trainer, params: nnx.State, variables: nnx.State, step: int) -> Trained:
    """The model of a trainer with the parameters of a step."""
    return Trained(experiment, trainer.graph, params, variables, trainer.layout, trainer.evaluate, step)


def model_as_trained(experiment: Experiment, model: DecoderLM, step: int) -> Trained:
    """A model as it is, on the first device: packed or published, stacked or not."""
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    layout = one_device()
    return Trained(experiment, graph, params, variables, layout, build_evaluate(graph, layout), step)


def one_device() -> Layout:
    """The first device of this process, as a mesh."""
    return Layout(MeshShape(data=1).build(jax.local_devices()[:1]))


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
    if is_quantized(directory.path):
        model, packed_step = load_quantized_run(directory.path, experiment.model)
        if step not in (None, packed_step):
            raise ValueError(f"checkpoint is {step}; {path} holds the packed weights of step {packed_step} alone")
        return model_as_trained(experiment, model, packed_step)._replace(run=directory.path)
    trainer = build_trainer(experiment.model, experiment.optimizer, one_device(), steps=experiment.steps)
    weights, step = restore_weights(directory, trainer, step)
    return as_trained(experiment, trainer, weights["params"], weights["variables"], step)._replace(run=directory.path)


def restore_weights(
    directory: RunDirectory, trainer: Trainer, step: int | None = None, *, metric: str = METRIC
) -> tuple[dict[str, nnx.State], int]:
    """The `params` and `variables` of a run's checkpoint (None: the best by `metric`) and its step, sharded as the
    trainer's; see `load_trained`."""
    abstract = trainer.abstract_state
    with Checkpoints(directory.checkpoints, metric=metric, read_only=True) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        return checkpoints.restore_part({"params": abstract.params, "variables": abstract.variables}, step)
