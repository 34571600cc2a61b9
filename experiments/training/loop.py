"""The training loop: data in, checkpoints and metrics out, and back after a kill to the same bits."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console, RenderableType

from ..experiment import TrainingRun
from ..places import local_folder
from ..run_directory import Metrics, RunDirectory
from .checkpoints import Checkpoints
from .interruption import Interruption
from .progress import TrainingProgress
from .step import ROUTERS, Trainer, TrainState, to_device

PROFILED_STEPS = range(5, 10)
"""Steps after the start that `profile` traces: late enough to be compiled."""


class NonFinite(ArithmeticError):
    """A loss or a gradient is not a finite number. The parameters were not touched."""


class Evaluation(NamedTuple):
    """A measurement on held-out data."""

    metrics: Mapping[str, float]
    """By name; the one that checkpoints are compared by among them."""
    said: str
    """The same for a person."""


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    """Steps done; fewer than asked for where the run was interrupted."""
    state: TrainState
    measured: Mapping[str, float] | None
    """After the last step; None where the run was interrupted."""
    units_per_second: float
    """Of the steps done now, without compilation, evaluation and saving."""
    interrupted: signal.Signals | None


def exit_status(interrupted: signal.Signals | None) -> int:
    """0 for a run that ended or that SIGTERM ended early as asked, 130 after Ctrl-C."""
    return 130 if interrupted is signal.SIGINT else 0


def run_loop(
    experiment: TrainingRun,
    directory: RunDirectory,
    trainer: Trainer,
    batches: Any,
    evaluate: Callable[[TrainState], Evaluation],
    *,
    metric: str,
    unit: str,
    units_per_step: int,
    console: Console,
    initial: Mapping[str, Any] | None = None,
    on_first_start: Callable[[], None] | None = None,
    notes: Sequence[RenderableType] = (),
    profile: bool = False,
) -> Outcome:
    """Run an experiment's steps in its directory, from its newest checkpoint on.

    Args:
        experiment: its numbers of steps.
        directory: of the run, opened and not yet locked.
        trainer: its functions.
        batches: an endless iterator with `get_state` and `set_state`, this process's rows.
        evaluate: measures a state on held-out data.
        metric: of an evaluation, what checkpoints are compared by; lower is better.
        unit: what a speed counts, such as "tokens".
        units_per_step: how many of them a step has.
        console: where to print.
        initial: fields of the first state that are not drawn.
        on_first_start: called where there was no checkpoint.
        notes: to be shown at the start.
        profile: trace a few steps into `profile/` in the run's directory.

    Raises:
        NonFinite: the loss or a gradient is not finite.
        DamagedCheckpoint, FailedSave: see `checkpoints.py`.
    """
    with (
        directory.lock() as check_lock,
        Checkpoints(
            directory.checkpoints, keep_last=experiment.keep_last, keep_best=experiment.keep_best, metric=metric
        ) as checkpoints,
    ):
        if checkpoints.latest_step() is not None:
            state, step = checkpoints.restore(trainer.abstract_state, batches)
            resume_step = step
        else:
            state, step, resume_step = trainer.init(jnp.uint32(experiment.seed)), 0, None
            state = state if initial is None else state._replace(**initial)
            if on_first_start is not None:
                on_first_start()
        first = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(Metrics(directory.path, resume_step, check_lock)) if first else None
            progress = stack.enter_context(
                TrainingProgress(
                    console,
                    name=directory.path.name,
                    step=step,
                    steps=experiment.steps,
                    unit=unit,
                    units_per_step=units_per_step,
                    quiet=not first,
                )
            )
            for note in notes:
                progress.note(note)
            if resume_step is not None:
                progress.note(f"continuing {directory.path} at step {step}")
            run = _Run(experiment, directory, trainer, evaluate, checkpoints, metrics, progress, profile)
            return run.steps(state, step, batches)


class _Run(NamedTuple):
    """Everything that a step of the loop touches besides the arrays."""

    experiment: TrainingRun
    directory: RunDirectory
    trainer: Trainer
    evaluate: Callable[[TrainState], Evaluation]
    checkpoints: Checkpoints
    metrics: Metrics | None
    progress: TrainingProgress
    profile: bool

    def steps(self, state: TrainState, step: int, batches: Any) -> Outcome:
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
                return Outcome(step, state, None, self.progress.units_per_second, interruption.requested)
            measured = self._evaluate(state, step, log=False) if measured is None else measured
            self.checkpoints.wait()
        if self.profile and step - start <= PROFILED_STEPS.start:
            self.progress.note(f"nothing was traced: profiling begins after step {PROFILED_STEPS.start} of a start")
        return Outcome(step, state, measured, self.progress.units_per_second, interruption.requested)

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
                self.metrics.write(step, "train", figures | {self.progress.speed_name: self.progress.units_per_second})
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

    def _evaluate_and_save(self, state: TrainState, step: int, batches: Any) -> Mapping[str, float] | None:
        measured = self._evaluate(state, step) if self._due(step, self.experiment.evaluate_every) else None
        if self._due(step, self.experiment.checkpoint_every):
            self._save(state, step, batches, measured or {})
        self.progress.paused()
        return measured

    def _evaluate(self, state: TrainState, step: int, *, log: bool = True) -> Mapping[str, float]:
        measured, said = self.evaluate(state)
        self.progress.note(f"step {step}: {said}")
        if log and self.metrics is not None:
            self.metrics.write(step, "held_out", measured)
        return measured

    def _save(self, state: TrainState, step: int, batches: Any, metrics: Mapping[str, float]) -> None:
        self.checkpoints.wait()  # the save under way may be of this very step
        if self.checkpoints.latest_step() != step:
            if self.metrics is not None:
                self.metrics.upload()  # first: a run that continues from the checkpoint measures no earlier line again
            self.checkpoints.save(step, state, batches, metrics)

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
