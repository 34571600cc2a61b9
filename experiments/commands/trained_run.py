"""Which run a command reads (the one named, the newest, or the default recipe's, trained now), and on which text."""

import dataclasses
from pathlib import Path

from rich.console import Console

from ..data import HeldOut, Mixture, TextFiles, held_out
from ..experiment import Experiment
from ..places import Place
from ..recipes import standard_library
from ..run_directory import newest_run, runs_in
from ..training.train import train

RUNS = Path("runs")


def find_run(path: Place | None, console: Console, *, with_checkpoints: bool = False) -> Place:
    """The given directory, else the newest run in runs/, else that of the default recipe, which it trains first.

    With `with_checkpoints` the newest that is not a packed copy of another one."""
    if path is not None:
        return path
    if not runs_in(RUNS):
        console.print("there is no run in runs/ yet: training the default recipe first (about 3 minutes on 2 cores)")
        if train(standard_library.recipe(), RUNS / "standard_library", console=console).interrupted:
            raise KeyboardInterrupt
    newest = newest_run(RUNS, with_checkpoints=with_checkpoints)
    console.print(f"run {newest}", markup=False, highlight=False)
    return newest


def chosen_text(
    experiment: Experiment,
    files: tuple[str, ...],
    max_bytes: int | None,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
) -> HeldOut:
    """The text files or globs, or with none the run's validation split; by default in the training's micro-batches."""
    return held_out(
        TextFiles(train=(), validation=files) if files else experiment.source,
        experiment.tokenizer,
        batch_size=batch_size or experiment.batch_size // experiment.gradient_accumulation,
        sequence_length=experiment.sequence_length if sequence_length is None else sequence_length,
        max_bytes=max_bytes,
    )


def parts_of_mixture(experiment: Experiment, max_bytes: int | None) -> list[tuple[str, HeldOut]]:
    """The validation split of each source of a mixture, with a name; empty for a run on one source."""
    if not isinstance(experiment.source, Mixture):
        return []
    parts = [dataclasses.replace(experiment, source=source) for source in experiment.source.sources]
    return [
        (f"source {number}, {type(part.source).__name__}", chosen_text(part, (), max_bytes))
        for number, part in enumerate(parts, 1)
    ]
