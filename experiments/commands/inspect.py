"""`dynamoe inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..data import HeldOut
from ..experiment import Experiment
from ..places import Place
from ..plot_style import COLOURS
from ..report import HOW_TO_COMPARE, PICTURES, report_routers, report_run
from ..router_tables import comparison_table, movement_table, pairs_table, router_table, token_table
from ..tables import for_terminal
from ..training.routers import measure_routers, router_history
from .model_option import ModelOptions
from .trained_run import chosen_text, parts_of_mixture


@dataclass(frozen=True, kw_only=True)
class Inspect(ModelOptions):
    """Show what a model's routers do on held-out text: load, entropy and drops of every layer, experts that work
    together, the tokens of each expert, how other texts differ; and how load and entropy moved over a run's training.

    Without arguments: the newest run in runs/ on the part of its validation split that the training evaluated on (the
    default recipe is trained first if there is none). Writes plots and report.html into the run's directory; of a
    published model into --output.
    """

    text: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--data",))] = ()
    """Text files or globs to measure on instead, all together one text."""
    compare: tuple[str, ...] = ()
    """Text files or globs to measure beside it, each a text of its own; quote a glob, or the shell makes many of it.
    None: the sources of a run that was trained on a mixture."""
    max_bytes: int | None = None
    """Read whole documents of each text up to so many bytes. None: all if --text is given, else as the training's
    evaluations did."""
    output: Path | None = None
    """With --model: a folder for plots and report.html. None: they are not written."""

    def run(self, console: Console) -> int:
        if len(self.compare) >= len(COLOURS):
            raise ValueError(
                f"compare names {len(self.compare)} texts; it may name at most {len(COLOURS) - 1}. A glob in quotes is "
                "one text, however many files it matches"
            )
        if self.output is not None and self.model is None:
            raise ValueError(f"output is {self.output}; a run's report lies in the run, give it with a published model")
        trained = self.load(console)
        experiment = trained.experiment
        (name, text), *others = self._texts(experiment)
        statistics = measure_routers(trained, text)
        which = f"checkpoint of step {trained.step:,}" if self.model is None else self.model
        measured_on = f"{text.bytes:,} bytes of {name}, {which}"
        compared = [(f"{of.bytes:,} bytes of {other}", measure_routers(trained, of)) for other, of in others]
        tables = [router_table(statistics, measured_on), token_table(statistics), pairs_table(statistics)]
        tables += [comparison_table([(measured_on, statistics), *compared])] if compared else []
        for table in tables:
            if table.rows:
                console.print(for_terminal(table))
        if trained.run is not None:
            _print_movement(trained.run, console)
        if not compared:
            console.print(HOW_TO_COMPARE, markup=False, highlight=False)
        folder = self.output if trained.run is None else trained.run
        if folder is None:
            return 0
        measured = (measured_on, statistics)
        try:
            if trained.run is None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                title = f"{self.model}, tokenizer {experiment.tokenizer}"
                report = report_routers(Path(folder), title, experiment, measured=measured, compared=compared)
            else:
                report = report_run(folder, experiment=experiment, measured=measured, compared=compared)
        except PermissionError as error:  # a run of somebody else's
            console.print(f"no plots and no report, {folder} cannot be written to: {error}", markup=False)
            return 0
        for file in (*(folder / picture for picture in PICTURES), report):
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


def _print_movement(run: Place, console: Console) -> None:
    """How the routers moved over a run's training, where that was logged."""
    try:
        console.print(for_terminal(movement_table(router_history(run))))
    except ValueError as error:  # trained before routers were logged
        console.print(str(error), markup=False, highlight=False)
