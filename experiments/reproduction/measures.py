"""What is measured of a trained arm. A measure of your own is a name and a function of a `FinishedRun`."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..data import held_out
from ..experiment import Experiment
from ..metrics import read_metrics
from ..training.restore import as_trained
from ..training.routers import RouterStatistics, measure_routers
from ..training.step import ROUTERS
from ..training.train import Result


@dataclass(frozen=True)
class FinishedRun:
    """A trained arm, ready to be measured."""

    experiment: Experiment
    result: Result

    @functools.cached_property
    def routers(self) -> list[RouterStatistics]:
        """What each layer's router does with the held-out text; empty where nothing routes."""
        if not any(line["split"] == ROUTERS for line in read_metrics(self.result.path)):
            return []
        experiment, state = self.experiment, self.result.state
        sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
        text = held_out(experiment.source, experiment.tokenizer, **sizes, max_bytes=experiment.evaluation_bytes)
        trained = as_trained(experiment, self.result.trainer, state.params, state.variables, self.result.step)
        return measure_routers(trained, text)


class Measure(NamedTuple):
    """A number of a finished run, by name; None where the run has no such thing."""

    name: str
    of: Callable[[FinishedRun], float | None]


def _mean_over_layers(figure: str) -> Callable[[FinishedRun], float | None]:
    def of(run: FinishedRun) -> float | None:
        values = [getattr(layer, figure) for layer in run.routers]
        return statistics.fmean(values) if values else None

    return of


BITS_PER_BYTE = Measure("held-out bits per byte", lambda run: run.result.bits_per_byte)
"""After the last step."""
MAX_VIOLATION = Measure("held-out MaxVio", _mean_over_layers("max_violation"))
"""The busiest expert's load over the mean load, minus 1, of the whole held-out text; the mean over layers. Wang et al.
2024, https://arxiv.org/abs/2408.15664, call it MaxVio_global."""
DROPPED = Measure("held-out share dropped", _mean_over_layers("dropped"))
"""Share of the held-out text's assignments that found no place; the mean over layers."""
