"""`dynamoe evaluate`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ..classification import ClassificationExperiment
from ..data import Source, TextFiles, concatenated, document_text, held_out, leading_documents
from ..experiment import Experiment
from ..run_directory import RunDirectory
from ..training.restore import Trained
from .cascade_option import CascadeOptions
from .evaluate_classifier import evaluate_classifier
from .model_option import ModelOptions
from .sweep_thresholds import SweepOptions, sweep_thresholds
from .trained_run import find_run


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions):
    """Measure a run's bits per byte on held-out text, a classifier's accuracy, or a published model's perplexity.

    On one device. Of a classifier the accuracy at every exit, on its test split.

    Without arguments: the newest run in runs/ on its own validation split, whole (the default recipe is trained first
    if there is none). With --model the perplexity of tokens as papers give it: the text in windows that do not overlap,
    and nothing of one window is seen in the next; compare it with figures of the same length and tokenizer alone.
    """

    text: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--data",))] = ()
    """Text files (.gz too) or globs to measure on instead."""
    separator: str | None = None
    """Splits a file of --text into documents, each read by itself from its beginning, as "<|endoftext|>". None: a file
    is one document, and with --model all files are one text."""
    max_bytes: int | None = None
    """Read whole documents up to so many bytes. None: all."""
    batch_size: int | None = None
    """Windows at once. None: a micro-batch of the training, or of a published model 4,096 tokens."""
    sequence_length: int | None = None
    """Tokens per window; a token sees at most so many before it. None: as in training, or of a published model what it
    was trained on, at most 2,048."""

    sweep: Literal["thresholds"] | None = None
    """Also answer prompts at each threshold of early exit: quality against FLOPs and time, drawn and calibrated. The
    model must have exits; writes early_exit.json and early_exit.png into the run's directory."""
    sweeping: SweepOptions = SweepOptions()
    early_exit: str | None = None
    """Of a classifier: answer at the first exit whose confidence (the gap between the best two classes) reaches this
    threshold, 0 to 1, or "calibrated" for the one that --sweep thresholds found. None: every exit by itself."""

    cascade: CascadeOptions = CascadeOptions()

    def run(self, console: Console) -> int:
        run = None if self.model is not None else find_run(self.run_dir, console)
        if run is not None and isinstance(RunDirectory.load(run).config, ClassificationExperiment):
            self._check_classifier()
            return evaluate_classifier(
                run,
                self.checkpoint,
                console,
                early_exit=self.early_exit,
                options=None if self.sweep is None else self.sweeping,
                cascade=self.cascade if self.cascade.behind else None,
            )
        if self.cascade.behind:
            raise ValueError(f"cascade.behind is {list(map(str, self.cascade.behind))}; only classifiers take it")
        if self.early_exit is not None:
            raise ValueError(
                f"early_exit is {self.early_exit!r}; of a language model dynamoe generate --early-exit answers early, "
                "and --sweep thresholds measures it"
            )
        if self.separator is not None and not self.text:
            raise ValueError(f"separator is {self.separator!r} and text empty; it splits the files of --text")
        trained = (self if run is None else dataclasses.replace(self, run_dir=run)).load(console)
        if self.sweep is not None:
            sizes = self._sizes(trained.experiment)
            source, tokenizer = self._source(trained.experiment), trained.experiment.tokenizer
            limit = self.max_bytes or trained.experiment.evaluation_bytes
            return sweep_thresholds(
                trained, held_out(source, tokenizer, **sizes, max_bytes=limit), self.sweeping, console
            )
        as_one = self.model is not None and self.separator is None
        line = (self._perplexity if as_one else self._bits_per_byte)(trained)
        console.print(line, markup=False, highlight=False)
        return 0

    def _check_classifier(self) -> None:
        """Refuse what only a language model has."""
        for name in ("text", "separator", "max_bytes", "batch_size", "sequence_length", "tokenizer"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; the run is a classifier's, which has none")
        asked = {"sweep": self.sweep, "early_exit": self.early_exit, "cascade.behind": self.cascade.behind}
        given = [f"{name} is {value!r}" for name, value in asked.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}; give one of them")

    def _sizes(self, experiment: Experiment) -> dict[str, int]:
        length = experiment.sequence_length if self.sequence_length is None else self.sequence_length
        rows = experiment.batch_size // experiment.gradient_accumulation
        return {"batch_size": rows if self.batch_size is None else self.batch_size, "sequence_length": length}

    def _source(self, experiment: Experiment) -> Source:
        if not self.text:
            return experiment.source
        return TextFiles(train=(), validation=self.text, separator=self.separator)

    def _what(self, experiment: Experiment) -> str:
        return f"text {' '.join(self.text)}" if self.text else f"validation split of {experiment.source}"

    def _bits_per_byte(self, trained: Trained) -> str:
        experiment = trained.experiment
        sizes = self._sizes(experiment)
        text = held_out(self._source(experiment), experiment.tokenizer, **sizes, max_bytes=self.max_bytes)
        at = f"at step {trained.step}" if self.model is None else f"of {self.model}"
        return (
            f"{trained.bits_per_byte(text):.4f} bits per byte {at}: {text.bytes:,} bytes in {text.documents:,} "
            f"documents, {text.tokens:,} targets, {self._what(experiment)}, tokenizer {experiment.tokenizer}, windows "
            f"of {sizes['sequence_length']} tokens that do not overlap"
        )

    def _perplexity(self, trained: Trained) -> str:
        experiment = trained.experiment
        sizes = self._sizes(experiment)
        documents = leading_documents(self._source(experiment), self.max_bytes)
        text, left_out = concatenated([document_text(each) for each in documents], experiment.tokenizer, **sizes)
        nats = trained.nats(text) / text.tokens
        return (
            f"perplexity {math.exp(nats):.4f} ({nats:.4f} nats a token) of {self.model}: {text.tokens:,} targets, "
            f"{text.bytes:,} bytes, {self._what(experiment)}, tokenizer {experiment.tokenizer}, windows of "
            f"{text.batches[0].tokens.shape[1]} tokens that do not overlap, the first of each no target, the last "
            f"{left_out} tokens left out"
        )
