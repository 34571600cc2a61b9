"""`dynamoe plan`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ...models import MeshShape
from ..experiment import Experiment
from ..files import write_atomically
from ..planning.compiled import Generation, Step, generation_steps_of, training_step
from ..planning.pictures import Bar, draw_memory, draw_time
from ..planning.placement import PlacedMesh, place
from ..planning.plan import StepPlan, plan_step
from ..planning.report import as_json, page, search_table, tables
from ..planning.roofline import assumptions
from ..planning.search import Search, search_meshes
from ..planning.target import Target, find_target
from ..planning.winner import recipe_name, winner_text
from ..tables import for_terminal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a recipe's steps for devices that are not here: memory, flops, collectives, and an estimate of time.

    Without arguments: the default recipe's training step on the smallest slice of v5e.
    The options below the recipe's name change single values of what the recipe builds, as those of `dynamoe train` do.
    Needs the chips' compilers, no chip: pip install 'dynamoe[aot]'. Status 1: it does not fit.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """A recipe file (.py). None: the standard library's."""
    chip: str = "v5e"
    """As v5e, v5p, v6e, tpu7x, h100 or h200."""
    topology: str | None = None
    """Of a TPU as 4x4x4, of GPUs hosts x devices of each, as 4x8. None: by --devices, else the smallest."""
    devices: int | None = None
    """How many devices. None: by --topology."""
    phase: Literal["training", "generation", "all"] = "training"
    """Which steps: that of training, prefill and one step of decoding, or all three."""
    generation: Generation = Generation()
    search: bool = False
    """Compare all meshes by formulas, compile the best five, and write the best into --output as a recipe."""
    output: Path | None = None
    """A folder for plan.md, plan.json and the pictures. None: print only; with --search plans/ and recipe and chip."""
    base: Annotated[Experiment | None, tyro.conf.Suppress] = None
    """What the recipe builds, before options change it."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]

    def __post_init__(self):
        if self.search and self.phase != "training":
            raise ValueError(f"phase is {self.phase} with search; meshes are compared by their training step")

    def run(self, console: Console) -> int:
        target = find_target(self.chip, self.topology, self.devices)
        folder = self.output or (Path("plans") / self._winner(Path(), target).stem if self.search else None)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder}: it is a file; give a folder")
        if self.search:
            self._winner_text(folder or Path(), MeshShape(), target)  # says now what it could not write later
            return self._search(target, folder or Path(), console)
        placement = place(self.experiment.mesh, target)
        plans = []
        for step in self._steps(placement):
            _note(console, f"compiling the {step.name} for {target.devices} devices of {target.chip}")
            plans.append(plan_step(self.experiment, step, placement))
            self._show(plans[-1], console)
        self._show_assumptions(target, console)
        if folder is not None:
            bars = [Bar(plan.name, plan.memory, plan.estimate, not plan.by_formulas) for plan in plans]
            self._write(folder, placement, plans, None, bars, console)
        return int(any(plan.refusal is not None for plan in plans))

    def _steps(self, placement: PlacedMesh) -> list[Step]:
        """All of them before any is compiled, so that what does not divide is said first."""
        training = [training_step(self.experiment, placement)] if self.phase != "generation" else []
        if self.phase == "training":
            return training
        return [*training, *generation_steps_of(self.experiment, self.generation, placement)]

    def _search(self, target: Target, folder: Path, console: Console) -> int:
        search = search_meshes(self.experiment, target, lambda text: _note(console, text))
        console.print(for_terminal(search_table(search)))
        best, winner = search.candidates[0], search.winner
        shown = [best.compiled] if best.compiled is not None else []
        for plan in shown:
            self._show(plan, console)
        self._show_assumptions(target, console)
        bars = [
            Bar(
                candidate.name,
                candidate.formulas.memory if candidate.compiled is None else candidate.compiled.memory,
                candidate.formulas.estimate if candidate.compiled is None else candidate.compiled.estimate,
                candidate.compiled is not None and not candidate.compiled.by_formulas,
            )
            for candidate in search.candidates[:20]
        ]
        self._write(folder, best.placement, shown, search, bars, console)
        if winner is None:
            _note(console, "no mesh that was compiled fits: there is no recipe to write")
            return 1
        file = self._winner(folder, target)
        write_atomically(file, self._winner_text(folder, winner.shape, target))
        _note(console, f"best: {winner.name}; recipe: {file}")
        return 0

    def _winner(self, folder: Path, target: Target) -> Path:
        return folder / f"{recipe_name(self.recipe)}_{target.chip}_{target.topology}.py"

    def _winner_text(self, folder: Path, mesh: MeshShape, target: Target) -> str:
        best = dataclasses.replace(self.experiment, mesh=mesh)
        return winner_text(self._winner(folder, target), self.recipe, self.base or self.experiment, best, target)

    def _show(self, plan: StepPlan, console: Console) -> None:
        if plan.refusal is not None:
            _note(console, f"the {plan.name} does not fit: {plan.refusal}")
        elif plan.compile_seconds is not None:
            _note(console, f"the {plan.name} compiled in {plan.compile_seconds:.1f} s")
        for table in tables(plan):
            console.print(for_terminal(table))

    def _show_assumptions(self, target: Target, console: Console) -> None:
        _note(console, "The estimate assumes:")
        for line in assumptions(target.chip):
            _note(console, f"- {line}")

    def _write(
        self,
        folder: Path,
        placement: PlacedMesh,
        plans: list[StepPlan],
        search: Search | None,
        bars: list[Bar],
        console: Console,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target = placement.target
        title = f"{recipe_name(self.recipe)} on {target.devices} devices of {target.chip} ({target.topology})"
        command = f"dynamoe plan {self.recipe or ''} --chip {target.chip} --topology {target.topology}"
        command = " ".join([*command.split(), *(["--search"] if search is not None else [])])
        draw_memory(bars, folder / "memory.png", title=title)
        if any(bar.estimate is not None for bar in bars):
            draw_time(bars, folder / "time.png", title=title)
        write_atomically(folder / "plan.json", json.dumps(as_json(placement, plans, search), indent=1) + "\n")
        write_atomically(folder / "plan.md", page(title, command, placement, plans, search))
        _note(console, f"written: {folder / 'plan.md'}")


def _note(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
