"""`dynamoe inspect`."""

from dataclasses import dataclass

from rich.console import Console

from ..data import HeldOut
from ..experiment import Experiment
from ..plot_style import COLOURS
from ..report import HOW_TO_COMPARE, PICTURES, report_run
from ..router_tables import comparison_table, movement_table, pairs_table, router_table, token_table
from ..tables import for_terminal
from ..training.restore import load_trained
from ..training.routers import measure_routers, router_history
from .place_option import PlaceOption
from .trained_run import chosen_text, find_run, parts_of_mixture


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a run's routers do on held-out text: load, entropy and drops of every layer, experts that work
    together, the tokens of each expert, how other texts differ; and how load and entropy moved over the training.

    Without arguments: the newest run in runs/ on the part of its validation split that the training evaluated on (the
    default recipe is trained first if there is none). Writes plots and report.html into the run's directory.
    """

    run_dir: PlaceOption | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""
    text: tuple[str, ...] = ()
    """Text files or globs to measure on instead, all together one text."""
    compare: tuple[str, ...] = ()
    """Text files or globs to measure beside it, each a text of its own; quote a glob, or the shell makes many of it.
    None: the sources of a run that was trained on a mixture."""
    max_bytes: int | None = None
    """Read whole documents of each text up to so many bytes. None: all if --text is given, else as the training's
    evaluations did."""

    def run(self, console: Console) -> int:
        if len(self.compare) >= len(COLOURS):
            raise ValueError(
                f"compare names {len(self.compare)} texts; it may name at most {len(COLOURS) - 1}. A glob in quotes is "
                "one text, however many files it matches"
            )
        path = find_run(self.run_dir, console)
        trained = load_trained(path, self.checkpoint)
        experiment = trained.experiment
        (name, text), *others = self._texts(experiment)
        statistics = measure_routers(trained, text)
        measured_on = f"{text.bytes:,} bytes of {name}, checkpoint of step {trained.step:,}"
        compared = [(f"{of.bytes:,} bytes of {other}", measure_routers(trained, of)) for other, of in others]
        tables = [router_table(statistics, measured_on), token_table(statistics), pairs_table(statistics)]
        tables += [comparison_table([(measured_on, statistics), *compared])] if compared else []
        for table in tables:
            if table.rows:
                console.print(for_terminal(table))
        try:
            console.print(for_terminal(movement_table(router_history(path))))
        except ValueError as error:  # trained before routers were logged
            console.print(str(error), markup=False, highlight=False)
        if not compared:
            console.print(HOW_TO_COMPARE, markup=False, highlight=False)
        try:
            report = report_run(path, experiment=experiment, measured=(measured_on, statistics), compared=compared)
        except PermissionError as error:  # a run of somebody else's
            console.print(f"no plots and no report, the run cannot be written to: {error}", markup=False)
            return 0
        for file in (*(path / picture for picture in PICTURES), report):
            if file.exists():
                console.print(str(file), markup=False, highlight=False)
        return 0

    def _texts(self, experiment: Experiment) -> list[tuple[str, HeldOut]]:
        """The text to measure on and those beside it, with their names."""
        default = None if self.text else experiment.evaluation_bytes
        limit = default if self.max_bytes is None else self.max_bytes
        texts = [(" ".join(self.text) or "held-out text", chosen_text(experiment, self.text, limit))]
        if self.text or self.compare:
            return texts + [(pattern, chosen_text(experiment, (pattern,), limit)) for pattern in self.compare]
        return texts + parts_of_mixture(experiment, limit)
