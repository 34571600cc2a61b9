"""`dynamoe demo`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from rich.console import Console

from ...models.accounting import Part, count_parts
from ...models.generation import Categorical
from ..data import HeldOut, document_text, held_out
from ..experiment import Experiment
from ..ngram import NGram
from ..page import Picture, Sample, Section, Table, Text, write_report
from ..places import Place
from ..plots import plot_expert_load, plot_losses, plot_router_history
from ..recipes import standard_library, standard_library_dense
from ..report import environment_table
from ..router_tables import favourites_table, router_table, token_table
from ..tables import for_terminal, parts_table
from ..training.restore import Trained, as_trained
from ..training.routers import RouterStatistics, measure_routers
from ..training.step_time import step_seconds
from ..training.train import Result, train
from .generate import continuation
from .place_option import PlaceOption

ORDER = 3
PROMPT = "def "
DENSE, MIXTURE, NGRAM = "dense", "mixture of experts", f"order-{ORDER} n-gram"
FOLDERS = {DENSE: "dense", MIXTURE: "moe"}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a dense model and a mixture of experts of equal cost per token, and show what the experts bring.

    About 4 minutes on 2 cores, without network: a table with both models' size, cost, speed and held-out bits per byte
    beside an order-3 n-gram, a sample, plots of losses and experts, and report.html. A demo that was stopped continues.
    """

    run_dir: PlaceOption | None = None
    """The demo's directory, with a run of each model in it. None: runs/demo, and for another seed runs/demo-seed1."""
    seed: int = 0
    """The same seed gives the same numbers, but for those of time."""
    smoke: bool = False
    """Seconds instead of minutes: everything runs, nothing is learnt. For CI."""

    def run(self, console: Console) -> int:
        name = "demo-smoke" if self.smoke else "demo"
        path = self.run_dir or Path("runs") / (f"{name}-seed{self.seed}" if self.seed else name)
        experiments = {DENSE: self._sized(standard_library_dense), MIXTURE: self._sized(standard_library)}
        results = {}
        for name, experiment in experiments.items():
            results[name] = train(experiment, path / FOLDERS[name], console=console)
            if results[name].interrupted:
                return results[name].exit_status
        console.print(f"fitting an {NGRAM} on the same text, timing steps")
        outcome = measure(experiments, results, rounds=2 if self.smoke else 10)
        console.print(for_terminal(outcome_table(outcome)))
        console.print(f"a sample of the {MIXTURE}, drawn at temperature 0.8:", highlight=False)
        console.print(outcome.sample, markup=False, highlight=False)
        console.print(f"\nreport: {write_outcome(path, experiments, outcome)}", markup=False, highlight=False)
        return 0

    def _sized(self, recipe: ModuleType) -> Experiment:
        experiment = dataclasses.replace(recipe.recipe(), seed=self.seed)
        return dataclasses.replace(experiment, steps=10, evaluation_bytes=20_000) if self.smoke else experiment


class Outcome(NamedTuple):
    """What the demo measured; a mapping has an entry for each model."""

    steps: int
    tokens: int
    """That each model was trained on."""
    totals: Mapping[str, Part]
    """Parameters and FLOPs of the whole models."""
    bits_per_byte: Mapping[str, float]
    """On held-out text, the n-gram's too."""
    text: HeldOut
    seconds: Mapping[str, float]
    """Of a training step, the models taking turns."""
    routers: list[RouterStatistics]
    sample: str


def measure(experiments: Mapping[str, Experiment], results: Mapping[str, Result], *, rounds: int) -> Outcome:
    """Everything that the demo shows of two trained models. The results' states are consumed."""
    experiment, result = experiments[MIXTURE], results[MIXTURE]
    trained = as_trained(experiment, result.trainer, result.state.params, result.state.variables, result.step)
    sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
    text = held_out(experiment.source, experiment.tokenizer, **sizes, max_bytes=experiment.evaluation_bytes)
    ngram = ngram_bits_per_byte(experiment, text)
    written, routers = sample(trained), measure_routers(trained, text)
    runs = {name: (of.trainer, of.state) for name, of in results.items()}
    return Outcome(
        steps=result.step,
        tokens=result.step * sizes["batch_size"] * sizes["sequence_length"],
        totals={name: count_parts(e.model, e.sequence_length)[-1] for name, e in experiments.items()},
        bits_per_byte={name: of.bits_per_byte for name, of in results.items()} | {NGRAM: ngram},
        text=text,
        seconds=step_seconds(runs, text.batches[0], rounds=rounds),
        routers=routers,
        sample=written,
    )


def ngram_bits_per_byte(experiment: Experiment, text: HeldOut) -> float:
    """Bits per byte of an n-gram fitted on the training split, on the held-out text that the models are measured on."""
    tokenizer, source = experiment.tokenizer, experiment.source
    model = NGram.fit(
        tokenizer.encode_documents([document_text(each) for each in source.documents("train")]),
        vocab_size=tokenizer.vocab_size,
        order=ORDER,
    )
    documents = [document_text(each) for each in source.documents("validation")][: text.documents]
    return model.bits_per_byte(tokenizer.encode_documents(documents), text.bytes)


def sample(trained: Trained, tokens: int = 300) -> str:
    """A prompt and its continuation; what a terminal would take for a command is shown as a middle dot."""
    tokenizer, seed = trained.experiment.tokenizer, trained.experiment.seed
    drawn = continuation(trained.model, tokenizer, PROMPT, tokens=tokens, sampler=Categorical(), seed=seed)
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in PROMPT + "".join(drawn))


def outcome_table(outcome: Outcome) -> Table:
    """Both models and the n-gram, side by side."""
    models, per_step = (DENSE, MIXTURE), outcome.tokens / outcome.steps

    def row(name: str, values: Mapping[str, int | float], form: str) -> tuple[str, ...]:
        return (name, *(format(values[model], form) if model in values else "" for model in (*models, NGRAM)))

    totals, seconds = outcome.totals, outcome.seconds
    rows = [
        row("parameters, total", {name: totals[name].parameters for name in models}, ","),
        row("parameters, active per token", {name: totals[name].active_parameters for name in models}, ",.0f"),
        row("FLOPs per token, forward", {name: totals[name].flops for name in models}, ",.0f"),
        row("held-out bits per byte", outcome.bits_per_byte, ".4f"),
        row("training tokens/s", {name: per_step / seconds[name] for name in models}, ",.0f"),
        row("step time, dense = 1", {name: seconds[name] / seconds[DENSE] for name in models}, ".2f"),
    ]
    caption = (
        f"After {outcome.steps:,} steps, {outcome.tokens:,} tokens for each model. Held out: {outcome.text.bytes:,} "
        f"bytes in {outcome.text.documents} files. Step times are medians, the models taking turns."
    )
    return Table(("", *models, NGRAM), rows, caption)


def write_outcome(path: Place, experiments: Mapping[str, Experiment], outcome: Outcome) -> Place:
    """The demo's pictures and report.html, in its directory."""
    dense, mixture = (outcome.bits_per_byte[name] for name in (DENSE, MIXTURE))
    runs = {name: path / folder for name, folder in FOLDERS.items()}
    losses = plot_losses(runs, path / "loss.png", baseline=(NGRAM, outcome.bits_per_byte[NGRAM]))
    load = plot_expert_load(outcome.routers, path / "expert_load.png")
    history = plot_router_history(runs[MIXTURE], path / "routers.png")
    lead = (
        f"At equal cost per token and equal tokens the mixture of experts reaches {mixture:.3f} bits per byte, the "
        f"dense model {dense:.3f}. A training step takes {outcome.seconds[MIXTURE] / outcome.seconds[DENSE]:.2f} "
        "times as long."
    )
    what = (
        "Two language models read the sources of Python's standard library, byte by byte. They are alike but for their "
        "feed-forward networks: one for every token, or small ones, of which each token passes a shared one and the "
        "one of eight that its router picks."
    )
    sections = [
        Section("Result", [Text(what), outcome_table(outcome), Picture(losses, "Losses over the steps.")]),
        Section(
            "What the experts do",
            [
                router_table(outcome.routers, f"{outcome.text.bytes:,} bytes of held-out text"),
                Picture(load, "Load on held-out text."),
                Picture(history, "Entropy, MaxVio and load over the steps of the training."),
                token_table(outcome.routers),
                favourites_table(outcome.routers[0], experiments[MIXTURE].tokenizer),
            ],
        ),
        Section("A sample", [Sample(outcome.sample, f"The mixture continues {PROMPT!r} at temperature 0.8.")]),
        Section("Cost of the dense model", [parts_table(experiments[DENSE])]),
        Section("Cost of the mixture of experts", [parts_table(experiments[MIXTURE])]),
        Section("Environment", [environment_table(runs[MIXTURE])]),
    ]
    return write_report(path / "report.html", title="Dense and mixture of experts", lead=lead, sections=sections)
