"""`dynamoe export`."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from ...models.checkpoints import save_pretrained
from ..training.published_weights import published_again
from ..training.restore import load_trained
from .place_option import PlaceOption
from .trained_run import find_run


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a run that began from a published one as transformers loads it, in float32."""

    output: tyro.conf.Positional[Path]
    """A new or empty folder."""
    run_dir: PlaceOption | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""

    def run(self, console: Console) -> int:
        trained = load_trained(find_run(self.run_dir, console, with_checkpoints=True), self.checkpoint)
        save_pretrained(published_again(trained), self.output)
        console.print(f"step {trained.step} written to {self.output}", markup=False, highlight=False)
        return 0
