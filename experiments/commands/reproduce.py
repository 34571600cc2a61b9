"""`dynamoe reproduce`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ..files import read_json, write_atomically
from ..page import Table
from ..reproduction.page import write_page
from ..reproduction.paper import Found, find_paper, paper_names
from ..reproduction.picture import draw_results
from ..reproduction.results import collect, with_step_time
from ..reproduction.running import run_arms, time_steps
from ..tables import for_terminal

RESULTS = Path(__file__).parent.parent / "results"
"""The results that are committed."""
FEWEST_SEEDS, FEWEST_SMOKE_SEEDS = 3, 2
ROUNDS, SMOKE_ROUNDS = 30, 6


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Test a paper's claim at the scale of a laptop: arms trained from the same seeds, and a verdict by a rule.

    Without a name: the papers, what they claim, what they cost, and what came out.
    The runs lie in runs/reproduce/; what was stopped goes on, what is done is not repeated.
    The results (.json, .md, .png) go there too, or where --output says.
    """

    paper: Annotated[str | None, tyro.conf.Positional] = None
    """A paper's name, or the path of a file of yours that defines paper() -> Paper."""
    seeds: tuple[int, ...] = ()
    """At least three. None given: 0 1 2."""
    smoke: bool = False
    """Seconds: everything runs, nothing is learnt, two seeds, in runs/reproduce-smoke/. For CI."""
    measure_again: bool = False
    """Run nothing but the timing of training steps, and put that into the .json in --output: for a quiet machine."""
    render: bool = False
    """Run nothing: write the page and the picture anew from the .json in --output."""
    output: Path | None = None
    """The folder for the results; in a checkout, to commit them: experiments/results. None: the paper's runs."""

    def __post_init__(self):
        fewest = FEWEST_SMOKE_SEEDS if self.smoke else FEWEST_SEEDS
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; each may stand there once")
        if self.seeds and len(self.seeds) < fewest:
            raise ValueError(f"seeds is {self.seeds}; a verdict needs at least {fewest}")
        if self.smoke and self.output is not None:
            raise ValueError(f"output is {self.output} with smoke; numbers of a smoke test stay in runs/")
        if self.smoke + self.measure_again + self.render > 1:
            raise ValueError("more than one of smoke, measure_again and render is given; each stands alone")
        if self.paper is None and (self.seeds or self.smoke or self.measure_again or self.render or self.output):
            raise ValueError("paper is not given; `dynamoe reproduce` alone lists the papers")

    def run(self, console: Console) -> int:
        if self.paper is None:
            console.print(for_terminal(papers_table()))
            return 0
        found = find_paper(self.paper)
        folder = Path("runs") / ("reproduce-smoke" if self.smoke else "reproduce") / found.name
        file = (self.output or folder) / f"{found.name}.json"
        if not self.render:
            results = self._measured_again(found, folder, file, console) if self.measure_again else None
            results = results or self._reproduced(found, folder, console)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(results, indent=1) + "\n")
        results = _read(file)  # what is shown is what is stored
        draw_results(results, file.with_suffix(".png"))
        write_page(results, file.with_suffix(".md"))
        for finding in results["findings"]:
            console.print(f"{finding['verdict']}: {finding['claim']}", markup=False, highlight=False)
        console.print(f"{found.name}: {results['verdict']}; {file.with_suffix('.md')}", markup=False, highlight=False)
        return 0

    def _reproduced(self, found: Found, folder: Path, console: Console) -> dict[str, Any]:
        seeds = self.seeds or tuple(range(FEWEST_SMOKE_SEEDS if self.smoke else FEWEST_SEEDS))
        runs, step_time = run_arms(found, folder, seeds, console, smoke=self.smoke), None
        if found.paper.timed:
            rounds = SMOKE_ROUNDS if self.smoke else ROUNDS
            step_time = time_steps(found.paper, folder, console, rounds=rounds, smoke=self.smoke)
        return collect(found, runs, step_time, smoke=self.smoke)

    def _measured_again(self, found: Found, folder: Path, file: Path, console: Console) -> dict[str, Any]:
        if not found.paper.timed:
            raise ValueError(f"measure_again is True; {found.name} claims nothing about time")
        results = _read(file)  # before anything is measured
        step_time = time_steps(found.paper, folder, console, rounds=ROUNDS, again=True)
        return with_step_time(found.paper, results, step_time)


def papers_table() -> Table:
    """Our papers: claim, cost, and the state of the committed result."""
    papers = {name: find_paper(name).paper for name in paper_names()}
    rows = [
        (name, paper.title, paper.paragraph("Claim"), paper.paragraph("Cost"), _state(name))
        for name, paper in papers.items()
    ]
    caption = "dynamoe reproduce NAME runs one, dynamoe reproduce my_paper.py a file of yours."
    return Table(("name", "paper", "claim", "cost", "result"), rows, caption)


def _state(name: str) -> str:
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return "none yet"
    results = read_json(file)
    return f"{results['verdict']}, {len(results['seeds'])} seeds, {results['date']}"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; reproduce the paper first, or give the --output that holds its results"
        )
    return read_json(file)
