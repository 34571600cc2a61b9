"""The report of a run: its pictures and `report.html`, made from what the run left on disk."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.accounting import count_parts
from .experiment import FREE_FIELDS, Experiment
from .files import read_json
from .metrics import METRICS, read_metrics
from .page import Figures, Picture, Piece, Section, Table, Text, write_report
from .places import Place, absolute
from .plots import plot_expert_load, plot_losses, plot_router_history
from .router_tables import (
    Measured,
    comparison_table,
    differences_table,
    favourites_table,
    first_middle_last,
    movement_table,
    pairs_table,
    router_table,
    token_table,
)
from .run_directory import ENVIRONMENT, RunDirectory
from .specialization_plots import plot_coactivation, plot_comparison, plot_token_specialization
from .tables import parts_table
from .training.routers import RouterStatistics, router_history
from .training.specialization import pairs_up
from .training.step import ROUTERS

REPORT, LOSS_PLOT, ROUTERS_PLOT, LOAD_PLOT = "report.html", "loss.png", "routers.png", "expert_load.png"
PAIRS_PLOT, TOKENS_PLOT, TEXTS_PLOT = "coactivation.png", "token_experts.png", "texts.png"
PICTURES = (LOSS_PLOT, LOAD_PLOT, ROUTERS_PLOT, PAIRS_PLOT, TOKENS_PLOT, TEXTS_PLOT)
"""What a report may have left in a run's directory, besides itself."""
HOW_TO_COMPARE = "dynamoe inspect --compare 'other/*.txt' shows how the experts' load differs on another text."


def report_run(
    run: Place,
    *,
    experiment: Experiment | None = None,
    baseline: tuple[str, float] | None = None,
    measured: Measured | None = None,
    compared: Sequence[Measured] = (),
    sections: Sequence[Section] = (),
) -> Place:
    """Write a run's pictures (`PICTURES`, as far as it has them) and `report.html`. Older pictures are taken away.

    Works for a run that was interrupted, and for one without routers.

    Args:
        run: the run's directory.
        experiment: its experiment, where the caller has it. None: read from the directory.
        baseline: a name and its held-out bits per byte, drawn beside the run's.
        measured: on what the routers were measured, and their statistics. None: the last batch that was logged.
        compared: other texts on which they were measured, beside `measured`.
        sections: sections of the caller's own, after the result.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: there is no run, or it is no run of an Experiment, or its metrics are damaged.
    """
    if experiment is None:
        experiment = RunDirectory.load(run).config
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{run} holds a {type(experiment).__name__}; it must be the run of an Experiment")
    lines = read_metrics(run) if (run / METRICS).is_file() else []
    for name in PICTURES:
        (run / name).unlink(missing_ok=True)
    result = _result(run, experiment, lines, baseline)
    routers = _routers(run, any(line["split"] == ROUTERS for line in lines), measured)
    specialized = [] if measured is None else _specialization(run, experiment, measured, compared)
    return write_report(
        run / REPORT,
        title=absolute(run).name,
        lead=_lead(experiment, lines),
        sections=[
            Section("Result", result),
            *sections,
            *([Section("Routers", routers)] if routers else []),
            *specialized,
            Section("Model", [parts_table(experiment)]),
            Section("Configuration", [_configuration(experiment)]),
            Section("Environment", [environment_table(run)]),
        ],
    )


def report_routers(
    folder: Path, title: str, experiment: Experiment, *, measured: Measured, compared: Sequence[Measured] = ()
) -> Place:
    """Write the pictures and `report.html` of a model that is no run of ours, into a folder. See `report_run`."""
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    return write_report(
        folder / REPORT,
        title=title,
        lead=f"{_kind(experiment)}; its routers were measured.",
        sections=[
            Section("Routers", _routers(folder, logged=False, measured=measured)),
            *_specialization(folder, experiment, measured, compared),
            Section("Model", [parts_table(experiment)]),
        ],
    )


def environment_table(run: Place) -> Table:
    """Where a run's last start happened: time, devices, versions, text. Without rows where nothing is known."""
    file = run / ENVIRONMENT
    starts = read_json(file) if file.is_file() else []
    if not starts:
        return Table(("", ""), [], "Nothing is known about it.")
    last = starts[-1]
    devices = Counter(last["devices"]).items()
    rows = [
        ("started", f"{last['started']}, start {len(starts)} of this run" if len(starts) > 1 else last["started"]),
        ("devices", ", ".join(f"{count} × {kind}" for kind, count in devices)),
        ("processes", str(last["processes"])),
        ("system", last["system"]),
        *last["versions"].items(),
        *_leaves("text", last.get("source", {})),
    ]
    return Table(("", ""), rows)


def _kind(experiment: Experiment) -> str:
    networks = Counter(type(ffn).__name__ for ffn in experiment.model.feed_forwards).items()
    return f"A decoder of {experiment.model.layers} layers ({', '.join(f'{count} {name}' for name, count in networks)})"


def _lead(experiment: Experiment, lines: Sequence[Mapping[str, Any]]) -> str:
    kind = _kind(experiment)
    if not lines:
        return f"{kind}; nothing was measured yet."
    done = max(line["step"] for line in lines)
    ended = any(line["split"] == "held_out" and line["step"] == experiment.steps for line in lines)
    how = f"trained for {done:,} steps" if ended else f"{done:,} of {experiment.steps:,} steps logged so far"
    return f"{kind}, {how}."


def _result(
    run: Place, experiment: Experiment, lines: Sequence[Mapping[str, Any]], baseline: tuple[str, float] | None
) -> list[Piece]:
    training = [line for line in lines if line["split"] == "train"]
    if not training:
        return [Text("Nothing was measured yet.")]
    held_out = [line for line in lines if line["split"] == "held_out"]
    total = count_parts(experiment.model, experiment.sequence_length)[-1]
    tokens = max(line["step"] for line in lines) * experiment.batch_size * experiment.sequence_length
    speed = training[-1]["tokens_per_second"]  # 0 at the first step, which compiles
    entries = [
        (f"{held_out[-1]['bits_per_byte']:.3f}" if held_out else "–", "bits per byte on held-out text"),
        (f"{training[-1]['loss'] / math.log(2):.3f}", "bits per token on the last logged batch"),
        (f"{tokens:,}", "tokens trained on"),
        (f"{speed:,.0f}" if speed else "–", "tokens per second"),
        (f"{total.parameters:,}", "parameters"),
        (f"{total.active_parameters:,.0f}", "of them active per token"),
    ]
    picture = plot_losses({absolute(run).name: run}, run / LOSS_PLOT, baseline=baseline)
    return [Figures(entries), Picture(picture, "Loss of training batches and of the held-out text.")]


def _routers(run: Place, logged: bool, measured: Measured | None) -> list[Piece]:
    """Nothing, where routers were neither logged nor measured."""
    if not logged and measured is None:
        return []
    history = router_history(run) if logged else {}
    if measured is None:
        last = next(iter(history.values())).steps[-1]
        measured = (f"the training batch of step {last:,}", [of.at(layer, -1) for layer, of in history.items()])
    measured_on, statistics = measured
    load = plot_expert_load(statistics, run / LOAD_PLOT)
    pieces: list[Piece] = [router_table(statistics, measured_on), Picture(load, f"Load on {measured_on}.")]
    if history:
        picture = plot_router_history(run, run / ROUTERS_PLOT)
        pieces += [movement_table(history), Picture(picture, "Entropy, MaxVio and load over the steps of the run.")]
    return pieces


def _specialization(
    run: Place, experiment: Experiment, measured: Measured, compared: Sequence[Measured]
) -> list[Section]:
    """What the experts specialise in, as far as it was counted."""
    statistics = measured[1]
    if any(layer.counts is None for layer in statistics):
        return []
    tokens = plot_token_specialization(statistics, run / TOKENS_PLOT)
    pieces: list[Piece] = [
        token_table(statistics),
        Picture(tokens, "What the token id says about the expert, and what chance would give."),
    ]
    pieces += [favourites_table(statistics[i], experiment.tokenizer) for i in first_middle_last(len(statistics))]
    sections = [
        Section("Experts that work together", _pairs(run, statistics)),
        Section("Tokens of each expert", pieces),
    ]
    if compared:
        texts = [measured, *compared]
        picture = Picture(plot_comparison(texts, run / TEXTS_PLOT), "Load of every expert on each text.")
        sections.append(Section("Texts compared", [comparison_table(texts), picture, differences_table(texts)]))
    else:
        sections.append(Section("Texts compared", [Text(HOW_TO_COMPARE)]))
    return sections


def _pairs(run: Place, statistics: Sequence[RouterStatistics]) -> list[Piece]:
    single = [str(layer.layer) for layer in statistics if layer.counts and not pairs_up(layer.counts)]
    pieces: list[Piece] = []
    if len(single) < len(statistics):
        picture = plot_coactivation(statistics, run / PAIRS_PLOT)
        pieces = [pairs_table(statistics), Picture(picture, "Co-activation: which experts take the same tokens.")]
    if single:
        where = f"In layer {', '.join(single)}" if pieces else "In every layer that routes"
        pieces.append(Text(f"{where} a token goes to one expert: there are no pairs to show."))
    return pieces


def _configuration(experiment: Experiment) -> Table:
    """What the numbers depend on, field by field."""
    fields = {
        f"model.{field.name}": getattr(experiment.model, field.name) for field in dataclasses.fields(experiment.model)
    }
    fields |= {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    rows = [(name, str(value)) for name, value in fields.items() if name not in ("model", *FREE_FIELDS)]
    return Table(("field", "value"), rows, "What the numbers depend on; the whole configuration is in config.json.")


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
    """Nested dictionaries as rows: "text train bytes"."""
    if not isinstance(value, dict):
        return [(name, f"{value:,}" if isinstance(value, int) else str(value))]
    return [leaf for key, child in value.items() for leaf in _leaves(f"{name} {key}", child)]
