"""`dynamoe bench` of a kernel: check every contender's result, then time them in turns, as tables and as JSON lines.

A line of the output file is one contender in one pass of one case.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ...kernels.measuring import Check, Contender, ratio

PASSED = dict[tuple[int, str], list[Contender]]
"""By case and pass: what may be timed."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one contender over the cases of a kind."""

    ratios: list[float] = dataclasses.field(default_factory=list)
    percents: list[float] = dataclasses.field(default_factory=list)


def bench_kernel(kernel: ModuleType, cases: Sequence[Any], rounds: int, output: Path | None, console: Console) -> int:
    """Print what is left out, errors, times as multiples of the first peer's, and their means.

    Args:
        kernel: a module like `kernels/grouped_matmul/bench.py`: CASE, PASSES and the functions names, notes, ceilings,
            checks, seconds, rates and versions.
        cases: what is measured; each has a kind and passes, and its name is its string.
        rounds: how often everything is timed.
        output: for JSON lines; None: nowhere.
        console: for the rest.

    Returns:
        0; or 1 where a result of ours is wrong: then nothing is timed.
    """
    for note in kernel.notes(cases):
        console.print(note, highlight=False)
    passed = _check(kernel, cases, console)
    if passed is None:
        return 1
    with console.status("measuring ceilings"):
        ceilings = kernel.ceilings()
    if ceilings is not None:
        console.print(str(ceilings), highlight=False)
    names = kernel.names()
    measure = names[next(i for i, name in enumerate(names) if _is_measure(name, passed))]
    table = _table(f"time, {measure} = 1: the median over {rounds} rounds")
    _add_columns(table, (kernel.CASE, "pass", "numbers"), names)
    found: dict[tuple[str, str, str], Found] = defaultdict(Found)
    with console.status("timing") as status:
        for index, case in enumerate(cases):
            status.update(f"timing {case}")
            for which in case.passes:
                seconds, failed = kernel.seconds(case, which, passed[index, which], rounds)
                for check in failed:
                    console.print(f"{case}, {which}: {check.contender} failed: {check.refusal}", highlight=False)
                lines = []
                for contender, times in seconds.items():
                    rates = kernel.rates(case, which, contender, float(np.median(times)), ceilings)
                    ratios = {str(peer): ratio(times, seconds[peer]) for peer in seconds if peer.peer and peer.main}
                    lines.append(_line(case, which, contender, times, rates, ratios))
                    entry = found[case.kind, which, str(contender)]
                    if measure in ratios:
                        entry.ratios.append(ratios[measure].median)
                    if rates.get("percent_of_ceiling") is not None:
                        entry.percents.append(rates["percent_of_ceiling"])
                _add_rows(table, case, which, names, lines, measure)
                if output is not None:
                    append_lines(output, [{**line, **facts(kernel)} for line in lines])
    _print(table, console)
    _print(_summary(found), console)
    return 0


def _check(kernel: ModuleType, cases: Sequence[Any], console: Console) -> PASSED | None:
    """Print the largest errors; what is to be timed, or None where a result of ours is wrong."""
    worst: dict[tuple[str, str], dict[str, Check]] = defaultdict(dict)
    passed, refused, wrong = defaultdict(list), defaultdict(int), False
    with console.status("checking") as status:
        for index, case in enumerate(cases):
            status.update(f"checking {case}")
            for check in kernel.checks(case):
                if check.refusal:
                    refused[str(check.contender), check.refusal] += 1
                    continue
                if check.wrong:
                    wrong |= not check.contender.peer
                    console.print(
                        f"{case}, {check.which}: {check.contender} is WRONG by {check.error:.1e}, allowed is "
                        f"{check.allowed:.0e}",
                        highlight=False,
                    )
                else:
                    passed[index, check.which].append(check.contender)
                if check.error is not None:
                    row = worst[case.kind, str(check.contender)]
                    if check.which not in row or not check.error <= (row[check.which].error or 0.0):
                        row[check.which] = check
    table = _table("largest error over largest element of the float64 result, over all cases of a kind")
    _add_columns(table, ("kind", "contender"), (*kernel.PASSES, "allowed"))
    for (kind, name), row in worst.items():
        texts = {which: f"{check.error:.1e}" + " WRONG" * check.wrong for which, check in row.items()}
        errors = (texts.get(which, "") for which in kernel.PASSES)
        table.add_row(kind, name, *errors, f"{next(iter(row.values())).allowed:.0e}")
    for (name, reason), times in refused.items():
        console.print(f"{name} is left out {times} times: {reason}", highlight=False)
    _print(table, console)
    console.print("a result is wrong: nothing is timed" if wrong else "all correct", highlight=False)
    return None if wrong else passed


def _is_measure(name: str, passed: PASSED) -> bool:
    return any(contender.peer and contender.name == name for contenders in passed.values() for contender in contenders)


def _line(
    case: Any, which: str, contender: Contender, times: np.ndarray, rates: dict[str, Any], ratios: dict[str, Any]
) -> dict[str, Any]:
    return {
        "case": str(case),
        "kind": case.kind,
        "pass": which,
        "contender": str(contender),
        "name": contender.name,
        "numbers": contender.numbers,
        "shape": case.shape._asdict(),
        **({"group_sizes": case.sizes.tolist()} if hasattr(case, "sizes") else {}),
        "seconds": {"median": float(np.median(times)), "fastest": float(times.min())},
        **rates,
        "ratio": {peer: {"median": found.median, "fastest": found.fastest} for peer, found in ratios.items()},
        "rounds": len(times),
    }


def facts(kernel: ModuleType) -> dict[str, Any]:
    """On what it ran."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            **kernel.versions(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append_lines(output: Path, lines: list[dict[str, Any]]) -> None:
    """At once, so that what was measured stays if the rest is interrupted."""
    with output.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _add_rows(
    table: Table, case: Any, which: str, names: Sequence[str], lines: list[dict[str, Any]], measure: str
) -> None:
    """One row for each kind of numbers."""
    by_numbers = defaultdict(dict)
    for line in lines:
        ratios = line["ratio"].get(measure)
        by_numbers[line["numbers"]][line["name"]] = "" if ratios is None else f"{ratios['median']:.2f}"
    for numbers, row in by_numbers.items():
        table.add_row(str(case), which, numbers, *(row.get(name, "") for name in names))


def _summary(found: dict[tuple[str, str, str], Found]) -> Table:
    table = _table("over all cases of a kind")
    _add_columns(table, ("kind", "pass", "contender"), ("cases", "geometric mean", "worst", "% of ceiling"))
    for key, entry in found.items():
        if not entry.ratios:
            continue
        mean = math.exp(sum(map(math.log, entry.ratios)) / len(entry.ratios))
        percent = f"{np.mean(entry.percents):.0f}" if entry.percents else ""
        table.add_row(*key, str(len(entry.ratios)), f"{mean:.2f}", f"{max(entry.ratios):.2f}", percent)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_style="", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _print(table: Table, console: Console) -> None:
    """At its full width: a line stays one line, and whole, also in a file."""
    narrow = console.width
    console.width = 1000
    console.width = max(Measurement.get(console, console.options, table).maximum, narrow)
    console.print(table)
    console.width = narrow


def _add_columns(table: Table, words: Iterable[str], numbers: Iterable[str]) -> None:
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
