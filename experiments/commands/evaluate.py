"""`dynamoe evaluate`."""

from dataclasses import dataclass

from rich.console import Console

from ..training.evaluation import bits_per_byte
from ..training.restore import load_trained
from .place_option import PlaceOption
from .trained_run import chosen_text, find_run


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's bits per byte on held-out text, on one device.

    Without arguments: the newest run in runs/ on its own validation split, whole (the default recipe is trained first
    if there is none).
    """

    run_dir: PlaceOption | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""
    text: tuple[str, ...] = ()
    """Text files or globs to measure on instead."""
    max_bytes: int | None = None
    """Read whole documents up to so many bytes. None: all."""
    batch_size: int | None = None
    """Windows at once. None: a micro-batch of the training."""
    sequence_length: int | None = None
    """Tokens per window; a token sees at most so many before it. None: as in training."""

    def run(self, console: Console) -> int:
        trained = load_trained(find_run(self.run_dir, console), self.checkpoint)
        experiment, trainer = trained.experiment, trained.trainer
        length = experiment.sequence_length if self.sequence_length is None else self.sequence_length
        text = chosen_text(experiment, self.text, self.max_bytes, batch_size=self.batch_size, sequence_length=length)
        value = bits_per_byte(trainer.evaluate, trained.params, trained.variables, text, trainer.layout)
        what = f"text {' '.join(self.text)}" if self.text else f"validation split of {experiment.source}"
        console.print(
            f"{value:.4f} bits per byte at step {trained.step}: {text.bytes:,} bytes in {text.documents:,} documents, "
            f"{text.tokens:,} targets, {what}, "
            f"tokenizer {experiment.tokenizer}, windows of {length} tokens that do not overlap",
            highlight=False,
        )
        return 0
