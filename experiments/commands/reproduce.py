"""`dynamoe reproduce`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ..files import read_json, write_atomically
from ..page import Table
from ..tables import for_terminal

RESULTS = Path(__file__).parent.parent / "results"
"""The results that are committed."""
FEWEST_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Test a paper's claim at the scale of a laptop: arms trained from the same seeds, and a verdict by a rule.

    Without a name: the papers, what they claim, what they cost, and what came out.
    The runs lie in runs/reproduce/<paper>/; what was stopped goes on, what is done is not repeated.
    The results (.json, .md, .png) go there too, or where --output says.
    """

    paper: Annotated[str | None, tyro.conf.Positional] = None
    """A paper's name, or the path of a file of yours that defines paper() -> Paper."""
    seeds: tuple[int, ...] = ()
    """At least three. None given: 0 1 2."""
    smoke: bool = False
    """Seconds: everything runs, nothing is learnt, two seeds, in runs/reproduce-smoke/. For CI."""
    measure_again: bool = False
    """Time the training steps anew, where the paper has a claim about time; best on a machine that does nothing else."""
    render: bool = False
    """Run nothing: write the page and the picture anew from the .json in --output."""
    output: Path | None = None
    """The folder for the results; in a checkout, to commit them: experiments/results. None: the paper's runs."""

    def __post_init__(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; each may stand there once")
        if self.seeds and len(self.seeds) < self._fewest:
            raise ValueError(f"seeds is {self.seeds}; a verdict needs at least {self._fewest}")
        if self.smoke and self.output is not None:
            raise ValueError(f"output is {self.output} with smoke; numbers of a smoke test stay in runs/")
        if self.paper is None and self != Reproduce():
            raise ValueError("paper is not given; `dynamoe reproduce` alone lists the papers")

    @property
    def _fewest(self) -> int:
        return 2 if self.smoke else FEWEST_SEEDS

    def run(self, console: Console) -> int:
        from ..reproduction.page import write_page
        from ..reproduction.paper import find_paper
        from ..reproduction.picture import draw_results
        from ..reproduction.results import collect
        from ..reproduction.running import run_arms, time_steps

        if self.paper is None:
            console.print(for_terminal(papers_table()))
            return 0
        found = find_paper(self.paper)
        folder = Path("runs") / ("reproduce-smoke" if self.smoke else "reproduce") / found.name
        output = self.output or folder
        file = output / f"{found.name}.json"
        if self.render:
            if not file.is_file():
                raise ValueError(
                    f"{file}: no such file; reproduce the paper first, or give the --output of its results"
                )
        else:
            seeds = self.seeds or tuple(range(self._fewest))
            runs = run_arms(found, folder, seeds, console, smoke=self.smoke)
            step_time = None
            if found.paper.timed:
                rounds = 6 if self.smoke else 30
                again = self.measure_again
                step_time = time_steps(found, folder, seeds[0], console, rounds=rounds, again=again, smoke=self.smoke)
            output.mkdir(parents=True, exist_ok=True)
            results = collect(found, runs, step_time, smoke=self.smoke)
            write_atomically(file, json.dumps(results, indent=1) + "\n")
        results = read_json(file)
        draw_results(results, file.with_suffix(".png"))
        write_page(results, file.with_suffix(".md"))
        for finding in results["findings"]:
            console.print(f"{finding['verdict']}: {finding['claim']}", markup=False, highlight=False)
        console.print(f"{found.name}: {results['verdict']}; {file.with_suffix('.md')}", markup=False, highlight=False)
        return 0


def papers_table() -> Table:
    """Our papers: claim, cost, and the state of the committed result."""
    from ..reproduction.paper import find_paper, paper_names

    rows = []
    for name in paper_names():
        paper = find_paper(name).paper
        rows.append((name, paper.title, paper.paragraph("Claim"), paper.paragraph("Cost"), _state(name)))
    caption = "dynamoe reproduce NAME runs one; dynamoe reproduce my_paper.py a file of yours."
    return Table(("paper", "", "claim", "cost", "result"), rows, caption)


def _state(name: str) -> str:
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return "none yet"
    results: dict[str, Any] = read_json(file)
    return f"{results['verdict']}, {len(results['seeds'])} seeds, {results['date']}"
