"""Training a language model: its text, its first weights, and bits per byte on held-out text."""

import math
import signal
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console, RenderableType

from ...models import Layout
from ...moe import Upcycling
from ..data import HeldOut, check_vocabulary, held_out, training_batches
from ..experiment import FREE_FIELDS, Experiment
from ..places import Place, check_place
from ..published import is_published
from ..run_directory import RunDirectory
from ..tables import for_terminal, parts_table
from .evaluation import bits_per_byte
from .loop import Evaluation, exit_status, run_loop
from .process_rows import process_rows
from .published_weights import check_tokenizer, keep_origin, published_weights
from .restore import METRIC, restore_weights
from .step import Trainer, TrainState, build_trainer
from .storage import has_checkpoint
from .upcycling import upcycled_weights, upcycling_fact

FIXED_FACTS = ("source", "init_from", "upcycle")
"""Facts about a run that must stay those of its first start."""


class Result(NamedTuple):
    """How a run ended."""

    path: Place
    step: int
    """Steps done; fewer than asked for where the run was interrupted."""
    bits_per_byte: float
    """On held-out text after the last step; NaN where the run was interrupted."""
    tokens_per_second: float
    """Of the steps done now, without compilation, evaluation and saving."""
    trainer: Trainer
    state: TrainState
    held_out: HeldOut
    """The text that it was evaluated on."""
    interrupted: signal.Signals | None

    @property
    def exit_status(self) -> int:
        """See `loop.exit_status`."""
        return exit_status(self.interrupted)


def train(
    experiment: Experiment,
    path: Place,
    *,
    recipe: Path | None = None,
    init_from: Place | None = None,
    upcycle: Upcycling | None = None,
    profile: bool = False,
    trainer: Trainer | None = None,
    console: Console | None = None,
) -> Result:
    """Train an experiment in a run directory, or continue the run that is there.

    Args:
        experiment: what to train.
        path: the run's directory; new, empty, or of this very experiment. May be remote, see `places.py`.
        recipe: the recipe file that built the experiment, kept with the run.
        init_from: another run's directory, whose best parameters are the first of this one, or a published model.
        upcycle: makes a mixture of `init_from`, the run of a dense model, at the first start; a run that continues
            does not repeat it.
        profile: trace a few steps into `profile/` in the run's directory.
        trainer: of an earlier run of this experiment with another seed, which is then not compiled again.
        console: where to print.

    Raises:
        ValueError: something does not fit, before anything is written.
        NonFinite: the loss or a gradient is not finite.
        DamagedCheckpoint, FailedSave: see `checkpoints.py`.
    """
    path, init_from = check_place(path), None if init_from is None else check_place(init_from)
    if upcycle is not None and init_from is None:
        raise ValueError(f"upcycle is {upcycle} and init_from None; it must be the directory of a dense model's run")
    check_vocabulary(experiment.tokenizer, experiment.model.vocab)
    layout = Layout(experiment.mesh.build(), experiment.rules)
    layout.batch(experiment.batch_size // experiment.gradient_accumulation, 2)
    trainer = trainer or build_trainer(
        experiment.model,
        experiment.optimizer,
        layout,
        steps=experiment.steps,
        accumulation=experiment.gradient_accumulation,
    )
    sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
    # Held-out text goes through in micro-batches too: what fits into memory in training fits in evaluation.
    micro_batch = sizes | {"batch_size": experiment.batch_size // experiment.gradient_accumulation}
    batches = training_batches(
        experiment.source,
        experiment.tokenizer,
        **sizes,
        seed=experiment.seed,
        rows=process_rows(layout, experiment.batch_size),
    )
    validation = held_out(experiment.source, experiment.tokenizer, **micro_batch, max_bytes=experiment.evaluation_bytes)
    initial, published = None, False
    notes: list[RenderableType] = [for_terminal(parts_table(experiment))]
    if init_from is not None and not has_checkpoint(path / "checkpoints"):
        published = upcycle is None and is_published(init_from)
        if upcycle is not None:
            initial, note = upcycled_weights(init_from, experiment, trainer, upcycle)
            notes.append(note)
        elif published:
            check_tokenizer(init_from, experiment.tokenizer)
            initial = published_weights(init_from, experiment.model, trainer)
        else:
            initial = restore_weights(RunDirectory.load(init_from), trainer)[0]
    facts = {
        "source": experiment.source.describe(),
        "init_from": None if init_from is None else str(init_from),
        "upcycle": upcycling_fact(upcycle, experiment.model),
        "validation_bytes": validation.bytes,
    }
    directory = RunDirectory.open(path, experiment, recipe, facts, FREE_FIELDS, fixed_facts=FIXED_FACTS)

    def evaluate(state: TrainState) -> Evaluation:
        value = bits_per_byte(trainer.evaluate, state.params, state.variables, validation, trainer.layout)
        return Evaluation({METRIC: value}, f"{value:.4f} bits per byte on {validation.bytes:,} held-out bytes")

    def keep_the_origin() -> None:
        if init_from is not None and published and jax.process_index() == 0:
            keep_origin(init_from, directory.path)

    outcome = run_loop(
        experiment,
        directory,
        trainer,
        batches,
        evaluate,
        metric=METRIC,
        unit="tokens",
        units_per_step=math.prod(sizes.values()),
        initial=initial,
        on_first_start=keep_the_origin,
        notes=notes,
        profile=profile,
        console=console or Console(),
    )
    value = math.nan if outcome.measured is None else outcome.measured[METRIC]
    return Result(
        directory.path,
        outcome.step,
        value,
        outcome.units_per_second,
        trainer,
        outcome.state,
        validation,
        outcome.interrupted,
    )
