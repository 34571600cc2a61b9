"""What a recipe builds: a model, its data, an optimizer and the sizes of a training run."""

from dataclasses import dataclass

from ..models import Decoder, MeshRules, MeshShape
from .data import Bytes, Source, StandardLibrary, Tokenizer
from .optimizers import Muon, TrainingRule

FREE_FIELDS = ("mesh", "rules", "evaluate_every", "checkpoint_every", "log_every", "keep_last", "keep_best")
"""What may change when a run continues: the numbers it computes do not depend on these, up to float tolerance."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What every training run has, whatever it learns."""

    optimizer: TrainingRule = Muon()
    """Makes updates of gradients."""
    mesh: MeshShape = MeshShape()
    """How the devices are laid out."""
    rules: MeshRules = MeshRules()
    """Which logical axes are split over which mesh axes."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 32
    """Windows of text or examples per step, over all devices and micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches that a batch is cut into, one after another, to save memory."""
    seed: int = 0
    """Seed of parameters, data order, routing noise and augmentation."""
    evaluate_every: int = 250
    """Steps between two evaluations on held-out data; the last step is always evaluated."""
    checkpoint_every: int = 250
    """Steps between two checkpoints; the last step is always saved."""
    log_every: int = 10
    """Steps between two lines of training metrics."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Best checkpoints to keep besides."""

    def __post_init__(self):
        positive = ("steps", "batch_size", "gradient_accumulation", "evaluate_every", "checkpoint_every", "log_every")
        for name in (*positive, "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.keep_best < 0:
            raise ValueError(f"keep_best is {self.keep_best}; it must be at least 0")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation is {self.gradient_accumulation}; it must divide batch_size={self.batch_size}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**32 - 1")


@dataclass(frozen=True, kw_only=True)
class Experiment(TrainingRun):
    """One training run of a language model, whole: the same experiment and versions give the same numbers."""

    model: Decoder
    """The language model."""
    source: Source = StandardLibrary()
    """The text."""
    tokenizer: Tokenizer = Bytes()
    """Makes token ids of text."""
    sequence_length: int = 128
    """Tokens per window."""
    evaluation_bytes: int | None = 200_000
    """How much held-out text an evaluation reads, in bytes, in whole documents; none: all of it."""

    def __post_init__(self):
        super().__post_init__()
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length is {self.sequence_length}; it must be at least 1")
