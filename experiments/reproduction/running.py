"""Runs a paper's arms, seed by seed, and keeps what was measured: an interrupted reproduction goes on where it was.

FOLDER/<arm>-seed<k>/                a run like any other, see run_directory.py
FOLDER/<arm>-seed<k>/measured.json   what was measured of it; with this file a run is done, and not repeated
FOLDER/step_time.json                seconds of training steps, measured apart from the runs
"""

import datetime
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from ...models import Layout
from ..data import training_batches
from ..experiment import Experiment
from ..files import read_json, write_atomically
from ..run_directory import CONFIG, ENVIRONMENT, environment
from ..serialization import changes, to_json
from ..training.step import Trainer, build_trainer
from ..training.step_time import step_rounds
from ..training.train import Result, train
from .measures import FinishedRun, Measure
from .paper import Found, Paper

MEASURED, STEP_TIME = "measured.json", "step_time.json"


def run_arms(
    found: Found, folder: Path, seeds: Sequence[int], console: Console, *, smoke: bool = False
) -> list[dict[str, Any]]:
    """Train and measure what is not yet done. All arms of a seed come before the next seed: pairs are complete early.

    Returns:
        A record of each run, as measured.json has it, with its arm and seed.

    Raises:
        KeyboardInterrupt: a run was interrupted; it is saved.
        ValueError: a directory holds another configuration's run.
    """
    records, total = [], len(found.paper.arms) * len(seeds)
    trainers: dict[str, Trainer] = {}  # the seeds of an arm share what was compiled
    for seed in seeds:
        for arm, experiment in found.paper.at(seed=seed, smoke=smoke).items():
            path = _finished(folder.parent, experiment) or folder / f"{arm}-seed{seed}"
            record = _stored(path, experiment, found.paper.measures)
            if record is None:
                start, continued = time.perf_counter(), (path / CONFIG).exists()
                result = _train(experiment, path, found.file, trainers.get(arm))
                trainers[arm] = result.trainer
                run = FinishedRun(experiment, result)
                record = _measured(run, found.paper.measures, None if continued else start)
            records.append({"arm": arm, "seed": seed, **record})
            values = ", ".join(f"{name} {_shown(value)}" for name, value in record["measures"].items())
            took = "" if record["seconds"] is None else f", {record['seconds']:.0f} s"
            console.print(f"{len(records)} of {total}: {arm}, seed {seed}: {values}{took}", highlight=False)
    return records


def time_steps(
    paper: Paper, folder: Path, console: Console, *, rounds: int, again: bool = False, smoke: bool = False
) -> dict[str, Any]:
    """Seconds of training steps of all arms, with fresh parameters, taking turns in this process.

    Args:
        paper: the paper.
        folder: where step_time.json lies, or will.
        console: where to print.
        rounds: steps of each arm.
        again: measure even where step_time.json has it already.
        smoke: time the arms' smallest form.

    Returns:
        What step_time.json holds: "seconds" by arm and round, and the "environment" in which they were measured.
    """
    experiments = paper.at(seed=0, smoke=smoke)
    wanted = json.loads(json.dumps({arm: to_json(experiment) for arm, experiment in experiments.items()}))
    stored = read_json(folder / STEP_TIME) if (folder / STEP_TIME).exists() else None
    if stored is None or again or stored["configurations"] != wanted:
        console.print(f"timing {rounds} steps of {', '.join(experiments)}, in turns", highlight=False)
        stored = {"seconds": _step_rounds(experiments, rounds), "environment": environment(), "configurations": wanted}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / STEP_TIME, json.dumps(stored, indent=2) + "\n")
    return {name: stored[name] for name in ("seconds", "environment")}


def _step_rounds(experiments: Mapping[str, Experiment], rounds: int) -> dict[str, list[float]]:
    first = next(iter(experiments.values()))
    batches = training_batches(
        first.source,
        first.tokenizer,
        batch_size=first.batch_size,
        sequence_length=first.sequence_length,
        seed=first.seed,
    )
    batch = next(batches)
    runs = {}
    for arm, experiment in experiments.items():
        layout = Layout(experiment.mesh.build(), experiment.rules)
        trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=experiment.steps)
        runs[arm] = (trainer, trainer.init(jnp.uint32(experiment.seed)))
    return step_rounds(runs, batch, rounds=rounds)


def _stored(path: Path, experiment: Experiment, measures: Sequence[Measure]) -> dict[str, Any] | None:
    """The record of a finished run; None where there is none, or where it lacks a measure."""
    record = read_json(path / MEASURED) if _is_finished(path, experiment) else None
    if record is None or any(measure.name not in record["measures"] for measure in measures):
        return None
    return _chosen(record, measures)


def _train(experiment: Experiment, path: Path, recipe: Path | None, trainer: Trainer | None) -> Result:
    result = train(experiment, path, recipe=recipe, trainer=trainer, console=Console(quiet=True))
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _measured(run: FinishedRun, measures: Sequence[Measure], start: float | None) -> dict[str, Any]:
    """Measure a run and keep the record in its directory. `start` is when it began, None where it was continued."""
    file = run.result.path / MEASURED
    values = {measure.name: measure.of(run) for measure in measures}
    earlier = read_json(file) if file.exists() else None
    record = earlier or {
        "measures": {},
        "seconds": None if start is None else time.perf_counter() - start,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": read_json(run.result.path / ENVIRONMENT)[0],
    }
    record["measures"] |= values
    write_atomically(file, json.dumps(record, indent=2) + "\n")
    return _chosen(record, measures)


def _chosen(record: Mapping[str, Any], measures: Sequence[Measure]) -> dict[str, Any]:
    return {**record, "measures": {measure.name: record["measures"][measure.name] for measure in measures}}


def _finished(root: Path, experiment: Experiment) -> Path | None:
    """A finished run of this very configuration, whichever paper's folder under `root` it lies in."""
    return next((path for path in _folders(root) if _is_finished(path, experiment)), None)


def _folders(root: Path) -> Iterator[Path]:
    return (file.parent for file in sorted(root.glob(f"*/*/{MEASURED}")))


def _is_finished(path: Path, experiment: Experiment) -> bool:
    if not ((path / MEASURED).exists() and (path / CONFIG).exists()):
        return False
    return not changes(read_json(path / CONFIG), json.loads(json.dumps(to_json(experiment))))


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
