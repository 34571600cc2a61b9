"""`dynamoe inspect`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..report import LOAD_PLOT, LOSS_PLOT, ROUTERS_PLOT, movement_table, report_run, router_table
from ..tables import for_terminal
from ..training.restore import load_trained
from ..training.routers import measure_routers, router_history
from .trained_run import chosen_text, find_run


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a run's routers do: load, entropy and drops of every layer on held-out text, and over the training.

    Without arguments: the newest run in runs/ on the part of its validation split that the training evaluated on (the
    default recipe is trained first if there is none). Writes plots and report.html into the run's directory.
    """

    run_dir: Path | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""
    text: tuple[str, ...] = ()
    """Text files or globs to measure on instead."""
    max_bytes: int | None = None
    """Read whole documents up to so many bytes. None: all of --text, or as the training's evaluations did."""

    def run(self, console: Console) -> int:
        path = find_run(self.run_dir, console)
        trained = load_trained(path, self.checkpoint)
        experiment = trained.experiment
        default = None if self.text else experiment.evaluation_bytes
        text = chosen_text(experiment, self.text, default if self.max_bytes is None else self.max_bytes)
        statistics = measure_routers(trained, text)
        what = " ".join(self.text) if self.text else "held-out text"
        measured_on = f"{text.bytes:,} bytes of {what}, checkpoint of step {trained.step:,}"
        console.print(for_terminal(router_table(statistics, measured_on)))
        try:
            console.print(for_terminal(movement_table(router_history(path))))
        except ValueError as error:  # trained before routers were logged
            console.print(str(error), markup=False, highlight=False)
        try:
            report = report_run(path, experiment=experiment, measured=(measured_on, statistics))
        except PermissionError as error:  # a run of somebody else's
            console.print(f"no plots and no report, the run cannot be written to: {error}", markup=False)
            return 0
        for file in (path / LOSS_PLOT, path / LOAD_PLOT, path / ROUTERS_PLOT, report):
            if file.exists():
                console.print(str(file), markup=False, highlight=False)
        return 0
