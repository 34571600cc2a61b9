"""Which model a command reads, as options that several commands share: a run's, or a published one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ...models import DecoderLM
from ..data import StandardLibrary, Tokenizer
from ..experiment import Experiment
from ..published import load_published
from ..training.restore import Trained, load_trained, model_as_trained
from .place_option import PlaceOption
from .trained_run import find_run

LONGEST_WINDOW = 2048
"""Tokens of a window of a published model, if it was trained on as many and none is given."""
TOKENS_AT_ONCE = 4096
"""Tokens of all windows that a published model reads at once."""
LOSS_BLOCK = 256
"""Positions whose logits are held at once: vocabularies of published models are large."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base of the commands that read one model."""

    run_dir: PlaceOption | None = None
    """The run's directory. None: the newest in runs/."""
    checkpoint: int | None = None
    """The checkpoint's step. None: the best."""
    model: str | None = None
    """A published model instead: a folder with config.json and safetensors, a file of llama2.c, or
    organisation/name on the Hugging Face hub."""
    tokenizer: Path | None = None
    """Of the published model: a tokenizer.json, or a SentencePiece .model. None: the one beside its weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the published model's parameters and of computing with them."""

    def load(self, console: Console, *, with_checkpoints: bool = False) -> Trained:
        """The model that the options name.

        Args:
            console: is told which run was found.
            with_checkpoints: take no packed copy of a run for the newest one.

        Raises:
            ValueError: options that exclude each other, or there is no such model.
        """
        self.check()
        if self.model is None:
            run = find_run(self.run_dir, console, with_checkpoints=with_checkpoints)
            return load_trained(run, self.checkpoint)
        published = load_published(self.model, tokenizer=self.tokenizer, dtype=self.dtype)
        model = published.pretrained.model
        experiment = published_experiment(model, published.tokenizer, published.longest)
        trained = model_as_trained(experiment, model, 0)
        return trained._replace(stop_tokens=published.stop_tokens, pretrained=published.pretrained)

    def check(self) -> None:
        """Refuse options that exclude each other."""
        if self.model is not None:
            for name in ("run_dir", "checkpoint"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name} is {value} and model {self.model}; give a run or a published model")
        elif self.tokenizer is not None:
            raise ValueError(f"tokenizer is {self.tokenizer}; a run has its own, give it with a published model")


def published_experiment(model: DecoderLM, tokenizer: Tokenizer, longest: int | None) -> Experiment:
    """What commands ask of a run's experiment, for a published model; its losses hold few logits at a time."""
    model.config = dataclasses.replace(model.config, loss_block=LOSS_BLOCK)
    length = LONGEST_WINDOW if longest is None else min(longest, LONGEST_WINDOW)
    return Experiment(
        model=model.config,
        source=StandardLibrary(),
        tokenizer=tokenizer,
        batch_size=max(1, TOKENS_AT_ONCE // length),
        sequence_length=length,
    )
