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

from rich.console import Console

from ..data import training_batches
from ..experiment import Experiment
from ..files import read_json, write_atomically
from ..run_directory import CONFIG, ENVIRONMENT, environment
from ..serialization import changes, to_json
from ..training.loop import Result, train
from ..training.step_time import step_rounds
from .measures import FinishedRun, Measure
from .paper import Found

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
    for seed in seeds:
        for arm, experiment in found.paper.at(seed=seed, smoke=smoke).items():
            path = _finished(folder.parent, experiment) or folder / f"{arm}-seed{seed}"
            record = _run(experiment, path, found.paper.measures, found.file)
            records.append({"arm": arm, "seed": seed, **record})
            values = ", ".join(f"{name} {_shown(value)}" for name, value in record["measures"].items())
            took = "" if record["seconds"] is None else f", {record['seconds']:.0f} s"
            console.print(f"{len(records)} of {total}: {arm}, seed {seed}: {values}{took}", highlight=False)
    return records


def time_steps(
    found: Found, folder: Path, seed: int, console: Console, *, rounds: int, again: bool, smoke: bool = False
) -> dict[str, Any]:
    """Seconds of training steps of all arms, which take turns in this process, from where their runs of `seed` ended.

    Args:
        found: the paper; its runs of this seed are done.
        folder: where its runs are.
        seed: which runs.
        console: where to print.
        rounds: steps of each arm.
        again: measure even where step_time.json has it already.
        smoke: the runs are those of a smoke test.

    Returns:
        What step_time.json holds: "seconds" by arm and round, and where and when it was measured.
    """
    experiments = found.paper.at(seed=seed, smoke=smoke)
    wanted = json.loads(json.dumps({arm: to_json(experiment) for arm, experiment in experiments.items()}))
    stored = read_json(folder / STEP_TIME) if (folder / STEP_TIME).exists() else None
    if stored is None or again or stored["configurations"] != wanted:
        console.print(f"timing {rounds} steps of {', '.join(experiments)}, in turns", highlight=False)
        results = {
            arm: _train(experiment, _finished(folder.parent, experiment) or folder / f"{arm}-seed{seed}", found.file)
            for arm, experiment in experiments.items()
        }
        first = next(iter(experiments.values()))
        sizes = {"batch_size": first.batch_size, "sequence_length": first.sequence_length}
        batch = next(training_batches(first.source, first.tokenizer, **sizes, seed=seed))
        seconds = step_rounds(
            {arm: (result.trainer, result.state) for arm, result in results.items()}, batch, rounds=rounds
        )
        stored = {"seconds": seconds, "environment": environment(), "configurations": wanted}
        write_atomically(folder / STEP_TIME, json.dumps(stored, indent=2) + "\n")
    return {name: stored[name] for name in ("seconds", "environment")}


def _run(experiment: Experiment, path: Path, measures: Sequence[Measure], recipe: Path | None) -> dict[str, Any]:
    """The record of a run: the stored one, completed by measures that it lacks, or a new one."""
    stored = read_json(path / MEASURED) if _is_finished(path, experiment) else None
    if stored is not None and all(measure.name in stored["measures"] for measure in measures):
        return _chosen(stored, measures)
    start, continued = time.perf_counter(), (path / CONFIG).exists()
    run = FinishedRun(experiment, _train(experiment, path, recipe))
    values = {measure.name: measure.of(run) for measure in measures}
    if stored is None:
        stored = {
            "measures": {},
            "seconds": None if continued else time.perf_counter() - start,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": read_json(path / ENVIRONMENT)[0],
        }
    stored["measures"] |= values
    write_atomically(path / MEASURED, json.dumps(stored, indent=2) + "\n")
    return _chosen(stored, measures)


def _train(experiment: Experiment, path: Path, recipe: Path | None) -> Result:
    with Console(quiet=True) as quiet:
        result = train(experiment, path, recipe=recipe, console=quiet)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


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
