"""`dynamoe evaluate --sweep thresholds`: what each threshold of early exit costs, and one with a guarantee."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

from ...dynamic import EarlyExit, Guarantee, NeverExit, learn_then_test, units_needed
from ...models import DecoderLM, with_layers
from ...models.generation import Greedy
from ..data import HeldOut
from ..exit_plots import plot_sweep
from ..exit_sweep import Sweep, policy_record, prompt_nats, sweep
from ..files import write_atomically
from ..page import Table
from ..places import Place
from ..tables import for_terminal
from ..training.restore import Trained, load_trained
from .early_exit_option import GUARANTEE, SKIPPED, Skipped
from .place_option import PlaceOption

THRESHOLDS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
"""Fixed beforehand, from the safest on."""
PICTURE = "early_exit.png"
RISK = "disagreement with the full model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How thresholds are swept."""

    prompts: int = 100
    """Cut from the held-out text, at places drawn at random."""
    prompt_tokens: int = 64
    """Of each prompt."""
    answer_tokens: int = 64
    """Drawn after each prompt, greedily."""
    delta: float = 0.05
    """Share of an answer's tokens that may differ from the full model's, in expectation; of a classifier, share of the
    examples that may be wrong only because they were answered early."""
    epsilon: float = 0.05
    """Chance that the guarantee does not hold."""
    skipped_layers: Skipped = "defer"
    """What becomes of the layers that a token skips."""
    seed: int = 0
    """Of the places of the prompts."""
    beside: tuple[PlaceOption, ...] = ()
    """Other runs to measure beside it, such as a shallower model without exits that saw as much."""

    def __post_init__(self):
        for name in ("prompts", "prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def sweep_thresholds(trained: Trained, text: HeldOut, options: SweepOptions, console: Console) -> int:
    """Sweep, print, draw, calibrate, and write the guarantee beside the run.

    Raises:
        ValueError: the model has no exits; there are too few prompts for the guarantee, or too little text for them.
    """
    model = with_layers(trained.model, stacked=False)
    if model.config.exits is None:
        raise ValueError("Decoder.exits of the model is None; a sweep of thresholds needs a model trained with exits")
    needed = units_needed(options.delta, options.epsilon)
    if options.prompts < needed:
        raise ValueError(
            f"prompts is {options.prompts}; delta = {options.delta:g} with epsilon = {options.epsilon:g} needs {needed}"
        )
    policy = EarlyExit(thresholds=NeverExit(), skipped=SKIPPED[options.skipped_layers])
    prompts, answers = cut_prompts(text, options)
    difficulty = prompt_nats(model, prompts, answers)
    found = sweep(
        model,
        policy,
        prompts,
        difficulty,
        text,
        thresholds=THRESHOLDS,
        tokens=options.answer_tokens,
        others=[(Path(str(run)).name, _other(run, trained)) for run in options.beside],
    )
    console.print(for_terminal(sweep_table(found, options)))
    record = policy_record(model, policy, Greedy())
    guarantee = learn_then_test(
        found.losses,
        THRESHOLDS,
        policy=record,
        risk=RISK,
        unit="prompts",
        delta=options.delta,
        epsilon=options.epsilon,
        costs=found.layers,
    )
    console.print(guarantee.statement, markup=False, highlight=False)
    if not np.isnan(guarantee.cost):
        console.print(f"mean depth there: {guarantee.cost:.2f} of {model.config.layers} layers", highlight=False)
    if trained.run is not None:
        _write(guarantee, found, trained.run, console)
    return 0


def _other(run: Place, trained: Trained) -> DecoderLM:
    other = load_trained(run)
    if other.experiment.tokenizer != trained.experiment.tokenizer:
        raise ValueError(
            f"sweeping.beside: {run} has the tokenizer {other.experiment.tokenizer}; it must have "
            f"{trained.experiment.tokenizer}, as the run that is swept"
        )
    return with_layers(other.model, stacked=False)


def cut_prompts(text: HeldOut, options: SweepOptions) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the text that follows each, which says how hard it is."""
    rows = [(row[:-1], kept[:-1] > 0) for each in text.batches for row, kept in zip(*each[:2], strict=True)]
    tokens = np.concatenate([row[kept] for row, kept in rows])
    length = options.prompt_tokens + options.answer_tokens
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} tokens; a prompt with its answer takes {length}")
    starts = np.random.default_rng(options.seed).integers(0, len(tokens) - length, options.prompts)
    whole = [tokens[start : start + length].tolist() for start in starts]
    return [each[: options.prompt_tokens] for each in whole], [each[options.prompt_tokens :] for each in whole]


def sweep_table(found: Sweep, options: SweepOptions) -> Table:
    """A line for each threshold; costs are those of the full model's fastest decoder = 1."""
    full = found.points[0]
    rows = [
        (
            point.name if point.threshold is None else f"{point.threshold:g}",
            f"{point.layers:.2f}",
            f"{point.flops / full.flops:.2f}",
            f"{point.seconds / full.seconds:.2f}",
            f"{point.disagreement:.4f}",
            f"{point.bits_per_byte:.4f}",
            " ".join(f"{seconds * 1e3:.2f}" for seconds in point.by_difficulty),
        )
        for point in [full, *found.others, *found.points[1:]]
    ]
    columns = ("threshold", "layers", "FLOPs", "time", "disagreement", "bits per byte", "ms by difficulty")
    caption = (
        f"{options.prompts} prompts of {options.prompt_tokens} tokens, {options.answer_tokens} drawn greedily after "
        f"each, one at a time; layers skipped: {options.skipped_layers}. FLOPs and time per token over those of the "
        "full model's fastest decoder. Bits per byte of held-out text at the exits that each token takes, later tokens "
        "seeing what the full model shows. Milliseconds per token of the easiest to the hardest quarter of the "
        "prompts, by the full model's loss on the text that follows."
    )
    return Table(columns, rows, caption)


def _write(guarantee: Guarantee, found: Sweep, run: Place, console: Console) -> None:
    try:
        write_atomically(run / GUARANTEE, guarantee.to_json())
        picture = plot_sweep(found, run / PICTURE)
    except PermissionError as error:  # a run of somebody else's
        console.print(f"nothing is written, the run cannot be written to: {error}", markup=False)
        return
    for file in (run / GUARANTEE, picture):
        console.print(str(Path(file)), markup=False, highlight=False)
