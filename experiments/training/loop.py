"""The training loop: data in, checkpoints and metrics out, and back after a kill to the same bits."""

import contextlib
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from ...models import Layout
from ...moe import Upcycling
from ..data import HeldOut, check_vocabulary, held_out, training_batches
from ..experiment import FREE_FIELDS, Experiment
from ..places import Place, check_place, local_folder
from ..published import is_published
from ..run_directory import Metrics, RunDirectory
from ..tables import for_terminal, parts_table
from .checkpoints import Checkpoints
from .evaluation import bits_per_byte
from .interruption import Interruption
from .process_rows import process_rows
from .progress import TrainingProgress
from .published_weights import check_tokenizer, keep_origin, published_weights
from .restore import METRIC, restore_weights
from .step import ROUTERS, Trainer, TrainState, build_trainer, to_device
from .storage import has_checkpoint
from .upcycling import upcycled_weights, upcycling_fact

PROFILED_STEPS = range(5, 10)
"""Steps after the start that `profile` traces: late enough to be compiled."""

FIXED_FACTS = ("source", "init_from", "upcycle")
"""Facts about a run that must stay those of its first start."""


class NonFinite(ArithmeticError):
    """A loss or a gradient is not a finite number. The parameters were not touched."""


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
        """0 for a run that ended or that SIGTERM ended early as asked, 130 after Ctrl-C."""
        return 130 if self.interrupted is signal.SIGINT else 0


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
    console = console or Console()
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
    initial, note = None, None
    if init_from is not None and not has_checkpoint(path / "checkpoints"):
        if upcycle is not None:
            initial, note = upcycled_weights(init_from, experiment, trainer, upcycle)
        elif is_published(init_from):
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
    with (
        directory.lock() as check_lock,
        Checkpoints(
            directory.checkpoints, keep_last=experiment.keep_last, keep_best=experiment.keep_best, metric=METRIC
        ) as checkpoints,
    ):
        if checkpoints.latest_step() is not None:
            state, step = checkpoints.restore(trainer.abstract_state, batches)
            resume_step = step
        else:
            state, step, resume_step = trainer.init(jnp.uint32(experiment.seed)), 0, None
            state = state if initial is None else state._replace(**initial)
            if init_from is not None and upcycle is None and is_published(init_from) and jax.process_index() == 0:
                keep_origin(init_from, directory.path)
        first = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(Metrics(directory.path, resume_step, check_lock)) if first else None
            progress = stack.enter_context(
                TrainingProgress(
                    console,
                    name=directory.path.name,
                    step=step,
                    steps=experiment.steps,
                    tokens_per_step=math.prod(sizes.values()),
                    quiet=not first,
                )
            )
            progress.note(for_terminal(parts_table(experiment)))
            if note is not None:
                progress.note(note)
            if resume_step is not None:
                progress.note(f"continuing {directory.path} at step {step}")
            run = _Run(experiment, directory, trainer, validation, checkpoints, metrics, progress, profile)
            return run.steps(state, step, batches)


class _Run(NamedTuple):
    """Everything that a step of the loop touches besides the arrays."""

    experiment: Experiment
    directory: RunDirectory
    trainer: Trainer
    validation: HeldOut
    checkpoints: Checkpoints
    metrics: Metrics | None
    progress: TrainingProgress
    profile: bool

    def steps(self, state: TrainState, step: int, batches: Any) -> Result:
        """Run the steps that are left. The metrics of a step are read while the next one runs."""
        start, total, measured, pending = step, self.experiment.steps, None, None
        with Interruption() as interruption, self._tracing() as trace:
            while step < total and not interruption.stops_before(step):
                trace(step - start)
                state, outcome = self.trainer.step(state, to_device(next(batches), self.trainer.layout))
                step += 1
                self._check(pending)
                pending = (step, outcome)
                self.progress.stepped(step)
                if self._due(step, self.experiment.evaluate_every) or self._due(step, self.experiment.checkpoint_every):
                    pending = self._check(pending)
                    measured = self._evaluate_and_save(state, step, batches)
            self._check(pending)
            if interruption.requested is not None and step < total:
                self._save(state, step, batches, {})
                self.checkpoints.wait()
                name = interruption.requested.name
                where = f" in one of {jax.process_count()} processes" if jax.process_count() > 1 else ""
                self.progress.note(
                    f"{name}{where}: saved step {step} of {total}; the same command continues from there"
                )
                return self._result(state, step, math.nan, interruption.requested)
            measured = self._evaluate(state, step, log=False) if measured is None else measured
            self.checkpoints.wait()
        if self.profile and step - start <= PROFILED_STEPS.start:
            self.progress.note(f"nothing was traced: profiling begins after step {PROFILED_STEPS.start} of a start")
        return self._result(state, step, measured, interruption.requested)

    def _due(self, step: int, every: int) -> bool:
        return step == self.experiment.steps or step % every == 0

    def _check(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        """Stop at a non-finite step, log a finite one."""
        if pending is None:
            return
        step, outcome = pending
        if not bool(outcome["finite"]):
            raise NonFinite(self._non_finite(step, outcome))
        if step == 1 or step % self.experiment.log_every == 0:
            arrays = ("finite", "gradient_norms", ROUTERS)
            figures = {name: float(value) for name, value in outcome.items() if name not in arrays}
            self.progress.measured(step, figures["loss"])
            if lost := _overflows(outcome):
                self.progress.note(f"step {step}: {lost}")
            if self.metrics is not None:
                self.metrics.write(step, "train", figures | {"tokens_per_second": self.progress.tokens_per_second})
                if ROUTERS in outcome:
                    self.metrics.write(step, ROUTERS, jax.device_get(outcome[ROUTERS]))

    def _non_finite(self, step: int, outcome: dict[str, Any]) -> str:
        norms = {name: float(norm) for name, norm in outcome["gradient_norms"].items()}
        wrong = {name: norm for name, norm in norms.items() if not math.isfinite(norm)}
        shown = ", ".join(f"{name} {norm}" for name, norm in list(wrong.items())[:5])
        lost = _overflows(outcome)
        self.checkpoints.wait()  # the save under way counts too
        steps = self.checkpoints.all_steps()
        return (
            f"step {step}: loss {float(outcome['loss'])}, gradient norm {float(outcome['gradient_norm'])}; "
            f"{len(wrong)} of {len(norms)} parameters have a gradient that is not finite: {shown or 'none'}. "
            f"{f'{lost}. ' if lost else ''}"
            f"The step was not applied; the last good checkpoint is {steps[-1] if steps else 'none'} in "
            f"{self.directory.checkpoints}"
        )

    def _evaluate_and_save(self, state: TrainState, step: int, batches: Any) -> float | None:
        measured = self._evaluate(state, step) if self._due(step, self.experiment.evaluate_every) else None
        if self._due(step, self.experiment.checkpoint_every):
            self._save(state, step, batches, {} if measured is None else {METRIC: measured})
        self.progress.paused()
        return measured

    def _evaluate(self, state: TrainState, step: int, *, log: bool = True) -> float:
        trainer = self.trainer
        value = bits_per_byte(trainer.evaluate, state.params, state.variables, self.validation, trainer.layout)
        self.progress.note(f"step {step}: {value:.4f} bits per byte on {self.validation.bytes:,} held-out bytes")
        if log and self.metrics is not None:
            self.metrics.write(step, "held_out", {METRIC: value})
        return value

    def _save(self, state: TrainState, step: int, batches: Any, metrics: dict[str, float]) -> None:
        self.checkpoints.wait()  # the save under way may be of this very step
        if self.checkpoints.latest_step() != step:
            if self.metrics is not None:
                self.metrics.upload()  # first: a run that continues from the checkpoint measures no earlier line again
            self.checkpoints.save(step, state, batches, metrics)

    def _result(
        self, state: TrainState, step: int, measured: float, interrupted: signal.Signals | None = None
    ) -> Result:
        speed = self.progress.tokens_per_second
        return Result(self.directory.path, step, measured, speed, self.trainer, state, self.validation, interrupted)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[Any]:
        """Yield a function to call before each step; it starts and stops the trace."""
        running = False

        def trace(step: int) -> None:
            nonlocal running
            if self.profile and step == PROFILED_STEPS.start:
                jax.profiler.start_trace(str(folder))
                running = True
            elif running and step == PROFILED_STEPS.stop:
                running = False
                jax.profiler.stop_trace()

        with local_folder(self.directory.path / "profile") as folder:
            try:
                yield trace
            finally:
                if running:
                    jax.profiler.stop_trace()


def _overflows(outcome: dict[str, Any]) -> str:
    """Which layers lost assignments because a device had no room to receive them; empty: none did."""
    shares = {name: float(value) for name, value in outcome.get(ROUTERS, {}).items() if name.endswith(".overflow")}
    lost = [f"{name.removesuffix('.overflow')} {share:.2%}" for name, share in shares.items() if share > 0]
    if not lost:
        return ""
    return (
        f"RaggedAllToAll.room is too small for what came to some device; share of assignments lost: {', '.join(lost)}"
    )
