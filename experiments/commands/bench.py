"""`dynamoe bench`."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from ...kernels.grouped_matmul import bench as grouped_matmul
from ...kernels.token_permute import bench as token_permute
from ...models import Layout, MeshShape
from ...models.accounting import count_parts
from ...moe import DenseDispatcher
from ..data import training_batches
from ..recipes import standard_library, standard_library_dense
from ..training.step import build_trainer, to_device
from ..training.step_time import step_seconds

KERNELS = {"grouped_matmul": grouped_matmul, "token_permute": token_permute}
"""Modules with the same names: cases, left_out, peers, errors, ratios, IMPLEMENTATIONS, PASSES, ALLOWED_ERROR, CASE."""
Benchmark = Literal["grouped_matmul", "token_permute", "training_step"]
STEP_ERROR = 1e-4
"""Allowed difference of a step's loss and gradient norm from those of the dense dispatcher, as a part of them."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Check results, then time them: a kernel's implementations against their peers, or the demo's training steps.

    Times are ratios from one process, interleaved. A wrong result ends with status 1, before anything is timed.
    """

    benchmark: Annotated[Benchmark, tyro.conf.Positional] = "grouped_matmul"
    """What is measured."""
    quick: bool = False
    """Fewer shapes of a kernel."""
    rounds: int = 9
    """How often each contender is timed: the fastest round of a kernel counts, the median of a step."""

    def __post_init__(self):
        if self.quick and self.benchmark == "training_step":
            raise ValueError("quick is True; training_step has one shape: give --rounds")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1")

    def run(self, console: Console) -> int:
        if self.benchmark == "training_step":
            return _training_step(self, console)
        return _kernel(KERNELS[self.benchmark], self, console)


def _kernel(kernel: ModuleType, bench: Bench, console: Console) -> int:
    cases = kernel.cases(bench.quick)
    for note in kernel.left_out(cases):
        console.print(note, highlight=False)
    if not _correct(kernel, cases, console):
        return 1
    ratios = _table(f"time, {kernel.peers()[0]} = 1")
    contenders = [name for name in (*kernel.runnable(), *kernel.peers()) if name != "reference"]
    _add_columns(ratios, (kernel.CASE, "pass"), contenders)
    found = defaultdict(list)
    with console.status("timing") as status:
        for case in cases:
            status.update(f"timing {case}")
            for which, ratio in kernel.ratios(case, bench.rounds):
                ratios.add_row(str(case), which, *(f"{ratio[n]:.2f}" if n in ratio else "" for n in contenders))
                for name, value in ratio.items():
                    found[case.kind, which, name].append(value)
    console.print(ratios)
    console.print(_summary(found))
    return 0


def _training_step(bench: Bench, console: Console) -> int:
    """The default recipe's mixture of experts over its dense twin, of equal active FLOPs per token."""
    dense, mixture = standard_library_dense.recipe(), standard_library.recipe()
    ffn = dataclasses.replace(mixture.model.ffn, dispatcher=DenseDispatcher())
    oracle = dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, ffn=ffn))
    sizes = {"batch_size": mixture.batch_size, "sequence_length": mixture.sequence_length}
    batch = next(training_batches(mixture.source, mixture.tokenizer, **sizes, seed=mixture.seed))
    trainers = {
        name: build_trainer(e.model, e.optimizer, Layout(MeshShape().build()), steps=e.steps)
        for name, e in (("dense", dense), ("mixture", mixture), ("oracle", oracle))
    }
    worst = 0.0
    ours, oracles = (
        trainer.step(trainer.init(jnp.uint32(mixture.seed)), to_device(batch, trainer.layout))[1]
        for trainer in (trainers["mixture"], trainers["oracle"])
    )
    for name in ("loss", "gradient_norm"):
        found, expected = float(ours[name]), float(oracles[name])
        error = abs(found / expected - 1)
        worst = max(worst, error if math.isfinite(error) else math.inf)
        console.print(f"{name} {found:.6f}, with every expert on every token {expected:.6f}", highlight=False)
    if worst > STEP_ERROR:
        console.print(f"they differ by {worst:.1e}, allowed is {STEP_ERROR:.0e}: nothing is timed", highlight=False)
        return 1
    runs = {name: (trainers[name], trainers[name].init(jnp.uint32(0))) for name in ("dense", "mixture")}
    seconds = step_seconds(runs, batch, rounds=bench.rounds)
    for name, e in (("dense", dense), ("mixture", mixture)):
        flops = count_parts(e.model, e.sequence_length)[-1].flops
        console.print(f"{name}: {flops:,.0f} FLOPs per token, {seconds[name] * 1e3:.0f} ms a step", highlight=False)
    console.print(
        f"a training step of the mixture takes {seconds['mixture'] / seconds['dense']:.2f} times the dense model's "
        f"(medians of {bench.rounds} steps in turns)",
        highlight=False,
    )
    return 0


def _correct(kernel: ModuleType, cases: list[Any], console: Console) -> bool:
    """Print the errors of every implementation; whether all are small enough."""
    allowed = kernel.ALLOWED_ERROR
    table = _table(f"largest error over largest element of the float64 result; allowed {allowed:.0e}")
    _add_columns(table, (kernel.CASE, "implementation"), kernel.PASSES)
    worst = 0.0
    with console.status("checking") as status:
        for case in cases:
            status.update(f"checking {case}")
            rows = defaultdict(dict)
            for name, which, error in kernel.errors(case):
                rows[name][which] = f"{error:.1e}" + ("" if error <= allowed else " WRONG")
                worst = max(worst, error)
            for name, row in rows.items():
                table.add_row(str(case), name, *(row.get(which, "") for which in kernel.PASSES))
    console.print(table)
    console.print("all correct" if worst <= allowed else "a result is wrong: nothing is timed", highlight=False)
    return worst <= allowed


def _summary(found: dict[tuple[str, str, str], list[float]]) -> Table:
    table = _table("over all cases of a kind")
    _add_columns(table, ("kind", "pass", "contender"), ("cases", "geometric mean", "worst"))
    for key, values in found.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        table.add_row(*key, str(len(values)), f"{mean:.2f}", f"{max(values):.2f}")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_style="", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _add_columns(table: Table, words: Iterable[str], numbers: Iterable[str]) -> None:
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
