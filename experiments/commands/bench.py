"""`dynamoe bench`."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from ...kernels.grouped_matmul import bench as grouped_matmul
from ...kernels.grouped_matmul.shapes import DATA, routed_counts


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Check the results of a kernel's implementations, then time them against their peers.

    Times are ratios from one process, interleaved. A wrong result ends with status 1, before anything is timed.
    """

    benchmark: Annotated[Literal["grouped_matmul"], tyro.conf.Positional] = "grouped_matmul"
    """What is measured."""
    quick: bool = False
    """Fewer shapes."""
    rounds: int = 9
    """How often each contender is timed; its fastest round counts."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1")

    def run(self, console: Console) -> int:
        return {"grouped_matmul": _grouped_matmul}[self.benchmark](self, console)


def _grouped_matmul(bench: Bench, console: Console) -> int:
    cases = grouped_matmul.cases(bench.quick)
    for note in _left_out(cases):
        console.print(note, highlight=False)
    if not _correct(cases, console):
        return 1
    ratios = _table(f"time, {grouped_matmul.peers()[0]} = 1")
    contenders = [name for name in (*grouped_matmul.IMPLEMENTATIONS, *grouped_matmul.peers()) if name != "reference"]
    _add_columns(ratios, ("case: M x D x F, E", "pass"), contenders)
    found = defaultdict(list)
    with console.status("timing") as status:
        for case in cases:
            status.update(f"timing {case}")
            for which, ratio in grouped_matmul.ratios(case, bench.rounds):
                ratios.add_row(str(case), which, *(f"{ratio[n]:.2f}" if n in ratio else "" for n in contenders))
                for name, value in ratio.items():
                    found[case.kind, which, name].append(value)
    console.print(ratios)
    console.print(_summary(found))
    return 0


def _left_out(cases: list[grouped_matmul.Case]) -> Iterator[str]:
    """What a reader might miss in the tables, and why."""
    if not routed_counts():
        yield f"{DATA} is not set: the rows with counts of OLMoE and Mixtral are left out"
    if "torch" not in grouped_matmul.peers():
        yield "torch is not installed: times are multiples of one dense product by JAX"
    if any("xla" not in case.implementations for case in cases):
        names = " and ".join(grouped_matmul.COSTS_TIMES_E)
        yield f"{names}, which cost E times too much here, are left out above {grouped_matmul.AFFORDABLE:.0e} FLOPs"


def _correct(cases: list[grouped_matmul.Case], console: Console) -> bool:
    """Print the errors of every implementation; whether all are small enough."""
    allowed = grouped_matmul.ALLOWED_ERROR
    table = _table(f"largest error over largest element of the float64 result; allowed {allowed:.0e}")
    _add_columns(table, ("case: M x D x F, E", "implementation"), grouped_matmul.PASSES)
    worst = 0.0
    with console.status("checking") as status:
        for case in cases:
            status.update(f"checking {case}")
            rows = defaultdict(dict)
            for name, which, error in grouped_matmul.errors(case):
                rows[name][which] = f"{error:.1e}" + ("" if error <= allowed else " WRONG")
                worst = max(worst, error)
            for name, row in rows.items():
                table.add_row(str(case), name, *(row.get(which, "") for which in grouped_matmul.PASSES))
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
