"""`dynamoe compress`."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from ...compress import CoverageReport, RoundToNearest, Rule
from ...kernels.quantized import FORMATS
from ...models import DecoderLM, with_layers
from ...models.checkpoints import save_pretrained
from ...models.generation import Engine, Request
from ...models.quantization import packable, parameter_names, quantize_model
from ..data import HeldOut
from ..files import write_atomically
from ..places import Place, is_remote
from ..training.quantized_run import COMPRESSION, check_is_free, checked_local, save_quantized_run
from ..training.restore import Trained, model_as_trained
from .model_option import ModelOptions
from .place_option import PlaceOption
from .trained_run import RUNS, chosen_text

GROUP_SIZES = (128, 64, 32, 16)
"""Of which the largest that divides a parameter is taken, if none is given."""
UNLESS_ASKED = ("embedding", "head_kernel")
"""Stay as they are if no pattern asks for them."""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Compress(ModelOptions):
    """Pack a run's weights or a published model's into few bits, by rounding to the nearest, and tell what it costs and
    what it saves.

    Without arguments: the newest trained run in runs/ (the default recipe is trained first if there is none), all
    layers' weights that a packed product multiplies, in int4. Writes the packed model as a run beside it, which
    `dynamoe evaluate --run-dir` and `dynamoe generate --run-dir` accept; a published one as a folder, for their
    --model.
    """

    format: Literal["int8", "int4", "int2", "fp8_e4m3", "nf4", "mxfp4"] = "int4"
    """The numbers that are left."""
    group_size: int | None = None
    """Neighbours that share a scale; it must divide every parameter. None: 32 for mxfp4, else for each parameter the
    largest of 128, 64, 32 and 16 that divides it, or its whole columns."""
    zero_points: bool = False
    """Also shift each group; integers alone."""
    only: tuple[str, ...] = ()
    """Patterns of parameters to pack, such as '*.experts.*'. None: attention, dense networks and experts of all layers,
    not the embedding and the head."""
    leave: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, whatever `only` says."""
    output: PlaceOption | None = None
    """The new directory. None: a run's with the format behind its name, as runs/mine-int4; of a published model its
    name with the format, in this directory."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--data",))] = ()
    """Text files or globs to measure on. None: the run's held-out text, or the standard library's."""
    max_bytes: int | None = None
    """Read whole documents of that text up to so many bytes. None: as the training's evaluations did."""
    tokens: int = 128
    """How many tokens to generate for a measurement of speed."""

    def __post_init__(self):
        if self.tokens < 2:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 2, for the first is not timed")
        self.technique(None)

    def run(self, console: Console) -> int:
        trained = self.load(console, with_checkpoints=True)
        output = checked_local(self.output or _free_name(self._original(trained), self.format))
        check_is_free(output)
        before = with_layers(trained.model, stacked=False)
        after, report = quantize_model(before, self.rules(before), leave=self.leave)
        console.print(str(report), markup=False, highlight=False)
        text = chosen_text(trained.experiment, self.text, self.max_bytes or trained.experiment.evaluation_bytes)
        packed = model_as_trained(trained.experiment, after, trained.step)
        bits = [_bits_per_byte(each, text) for each in (trained, packed)]
        speeds = tokens_per_second({"before": before, "after": after}, tokens=self.tokens)
        figures = {
            "bits_per_byte": bits,
            "text_bytes": text.bytes,
            "tokens_per_second": [speeds["before"], speeds["after"]],
            "coverage": report.to_json(),
        }
        if trained.run is None:
            _save_published(trained, after, output, figures)
        else:
            save_quantized_run(after, output, source=trained.run, step=trained.step, facts=figures)
        for line in _summary(report, bits, speeds, text, self.tokens):
            console.print(line, markup=False, highlight=False)
        console.print(f"written to {output}", markup=False, highlight=False)
        return 0

    def _original(self, trained: Trained) -> Place:
        """What the packed model is named after."""
        if trained.run is None:
            return Path(Path(str(self.model)).resolve().name.removesuffix(".bin"))
        return RUNS / trained.run.name if is_remote(trained.run) else Path(trained.run).absolute()

    def technique(self, inner: int | None) -> RoundToNearest:
        """What is done to a parameter whose products sum over `inner` numbers; None: whose length is not known."""
        format, size = FORMATS[self.format], self.group_size
        if size is None and inner is not None and not format.power_of_two:
            size = next((size for size in GROUP_SIZES if inner % size == 0), None)
        return RoundToNearest(format=format, group_size=size, zero_points=self.zero_points)

    def rules(self, model: DecoderLM) -> list[Rule]:
        """A rule for each parameter that is asked for, also for one that cannot be packed, so that it is refused; and
        for each pattern that fits nothing."""
        shapes = packable(model)
        patterns = self.only or tuple(name for name in shapes if name not in UNLESS_ASKED)
        names = [name for name in parameter_names(model) if not any(fnmatchcase(name, left) for left in self.leave)]
        rules = []
        for pattern in patterns:
            fitting = [name for name in names if fnmatchcase(name, pattern)] or [pattern]
            inner = {name: shapes[name][-2] if name in shapes else None for name in fitting}
            rules += [Rule(pattern=name, technique=self.technique(inner[name])) for name in fitting]
        return list({rule.pattern: rule for rule in rules}.values())


def tokens_per_second(models: Mapping[str, DecoderLM], *, tokens: int, batch: int = 1) -> dict[str, float]:
    """Greedy tokens of one row and second, the models in turns, medians of `ROUNDS`; without prompt and first token."""
    engines = {name: Engine(model, rows=batch, slots=tokens) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, engine in engines.items():
            for _ in range(batch):
                engine.submit(Request(prompt=(1,), max_tokens=tokens))
            before = engine.usage.drawn_seconds
            for _ in engine.run():
                pass
            if turn:  # in the first the functions are compiled
                seconds[name].append(engine.usage.drawn_seconds - before)
    return {name: (tokens - 1) / statistics.median(times) for name, times in seconds.items()}


def _bits_per_byte(trained: Trained, text: HeldOut) -> float:
    value = trained.bits_per_byte(text)
    if not math.isfinite(value):
        raise ValueError(f"the model has {value} bits per byte on held-out text; its weights are of no use")
    return value


def _save_published(trained: Trained, model: DecoderLM, output: Path, facts: dict[str, Any]) -> None:
    """Write a packed published model, and what was measured beside it."""
    assert trained.pretrained is not None
    save_pretrained(trained.pretrained._replace(model=model), output)
    write_atomically(output / COMPRESSION, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def _free_name(original: Place, format: str) -> Path:
    """Beside the original: its name with the format, and a number if that is taken."""
    original = Path(original)
    names = itertools.chain(
        [f"{original.name}-{format}"], (f"{original.name}-{format}-{n}" for n in itertools.count(2))
    )
    return next(path for name in names if not (path := original.with_name(name)).exists())


def _summary(
    report: CoverageReport, bits: list[float], speeds: dict[str, float], text: HeldOut, tokens: int
) -> list[str]:
    before, after = report.bytes_before, report.bytes_after
    return [
        f"bytes of weights: {before:,} before, {after:,} after, {after / before:.3f} of it",
        f"bits per byte: {bits[0]:.4f} before, {bits[1]:.4f} after ({text.bytes:,} bytes of held-out text)",
        f"tokens/s, one row, {tokens} tokens: {speeds['before']:,.0f} before, {speeds['after']:,.0f} after, "
        f"{speeds['after'] / speeds['before']:.2f} times",
    ]
