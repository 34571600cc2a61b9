"""`dynamoe train` with a recipe of a classifier."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from ..classification.experiment import ClassificationExperiment
from ..classification.train import accuracies, train_classifier
from .place_option import PlaceOption


@dataclass(frozen=True, kw_only=True)
class TrainClassifier:
    """Train the classifier of the recipe, or continue a run that was stopped.

    The options below the recipe's name change single values of what the recipe builds.
    Ctrl-C or SIGTERM saves; the same command continues.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """A recipe file (.py) whose recipe() returns a ClassificationExperiment."""
    run_dir: PlaceOption | None = None
    """The run's directory. None: runs/ and the recipe's name."""
    experiment: Annotated[ClassificationExperiment, tyro.conf.arg(name="")]

    def run(self, console: Console) -> int:
        assert self.recipe is not None  # without one, `dynamoe train` trains a language model
        path = self.run_dir or Path("runs") / self.recipe.stem
        result = train_classifier(self.experiment, path, recipe=self.recipe, console=console)
        if not result.interrupted:
            test = accuracies(self.experiment, result.trainer, result.state, self.experiment.source.examples("test"))
            if jax.process_index() == 0:
                console.print(f"test, after the last step: {test.said}", markup=False, highlight=False)
        return result.exit_status
