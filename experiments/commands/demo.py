"""`dynamoe demo`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from flax import nnx
from rich.console import Console
from rich.table import Table

from ...models.accounting import count_parts
from ...models.generate import Sampling
from ..data import held_out
from ..experiment import Experiment
from ..ngram import NGram
from ..plots import plot_losses
from ..recipes import standard_library
from ..run_directory import read_metrics
from ..training.loop import Result, train
from .generate import continuation

ORDER = 3
PROMPT = "def "


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small mixture of experts on the Python standard library's text and show what came of it.

    About 5 minutes on 2 cores, without network: a table with its size, cost and held-out bits per byte beside an
    order-3 n-gram, a sample, and a plot of the losses. A demo that was stopped continues.
    """

    run_dir: Path | None = None
    """The run's directory. None: runs/demo, or runs/demo-smoke."""
    smoke: bool = False
    """Seconds instead of minutes: everything runs, nothing is learnt. For CI."""

    def run(self, console: Console) -> int:
        experiment = standard_library.recipe()
        if self.smoke:
            experiment = dataclasses.replace(experiment, steps=10, evaluation_bytes=20_000)
        path = self.run_dir or Path("runs") / ("demo-smoke" if self.smoke else "demo")
        result = train(experiment, path, console=console)
        if result.interrupted:
            return result.exit_status
        console.print(f"fitting an order-{ORDER} n-gram on the same text")
        baseline = ngram_bits_per_byte(experiment)
        console.print(results_table(experiment, result, baseline))
        console.print("a sample, drawn at temperature 0.8:", highlight=False)
        console.print(sample(experiment, result), markup=False, highlight=False)
        picture = plot_losses(path, baseline=(f"order-{ORDER} n-gram", baseline))
        console.print(f"\nlosses: {picture}\nthe run: {path}", highlight=False)
        return 0


def ngram_bits_per_byte(experiment: Experiment) -> float:
    """Held-out bits per byte of an n-gram fitted on the training split, on the text that the model is measured on."""
    tokenizer, source = experiment.tokenizer, experiment.source
    model = NGram.fit(
        tokenizer.encode_documents(list(source.documents("train"))), vocab_size=tokenizer.vocab_size, order=ORDER
    )
    sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
    text = held_out(source, tokenizer, **sizes, max_bytes=experiment.evaluation_bytes)
    documents = list(source.documents("validation"))[: text.documents]
    return model.bits_per_byte(tokenizer.encode_documents(documents), text.bytes)


def results_table(experiment: Experiment, result: Result, baseline: float) -> Table:
    """What the model is, costs and reaches, beside the n-gram."""
    total = count_parts(experiment.model, experiment.sequence_length)[-1]
    trained = result.step * experiment.batch_size * experiment.sequence_length
    # From the metrics: a demo that had ended before took no step now.
    speed = [line["tokens_per_second"] for line in read_metrics(result.path) if line["split"] == "train"][-1]
    table = Table(title=f"after {result.step} steps, {trained:,} tokens")
    for name in ("", "mixture of experts", f"order-{ORDER} n-gram"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("parameters, total", f"{total.parameters:,}", "")
    table.add_row("parameters, active per token", f"{total.active_parameters:,.0f}", "")
    table.add_row("FLOPs per token, forward", f"{total.flops:,.0f}", "")
    table.add_row("held-out bits per byte", f"{result.bits_per_byte:.4f}", f"{baseline:.4f}")
    table.add_row("training tokens/s", f"{speed:,.0f}", "")
    return table


def sample(experiment: Experiment, result: Result, tokens: int = 300) -> str:
    """A prompt and its continuation."""
    model = nnx.merge(result.trainer.graph, result.state.params, result.state.variables)
    pieces = continuation(model, experiment.tokenizer, PROMPT, tokens=tokens, sampling=Sampling(), seed=experiment.seed)
    return PROMPT + "".join(pieces)
