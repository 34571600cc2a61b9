"""A paper's file: its arms, what is measured of them, what is claimed, and how such files are found."""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...moe import FeedForward
from .. import papers
from ..experiment import Experiment
from ..serialization import call_recipe
from .claims import Claim, Faster, Lower
from .measures import BITS_PER_BYTE, Measure

PARAGRAPHS = ("Claim", "Command", "Cost")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A published claim, made small enough for a laptop. Arms differ in what is compared, and share seed and data."""

    about: str
    """The file's docstring. Its first line names the paper and its idea; paragraphs that begin with "Claim: ",
    "Command: " and "Cost: " say what the paper found, with its own number, what to call and what that takes."""
    arms: Mapping[str, Experiment]
    """By a name that can be a folder's. The seed is set for each run."""
    claims: tuple[Claim, ...]
    """What is judged, each with its rule."""
    measures: tuple[Measure, ...] = (BITS_PER_BYTE,)
    """What is measured of each run."""

    def __post_init__(self):
        for name in PARAGRAPHS:
            self.paragraph(name)
        for arm in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", arm):
                raise ValueError(f"arms has {arm!r}; a name is made of letters, digits, '.', '-' and '_'")
        if not self.claims:
            raise ValueError("claims is empty; a paper needs at least one")
        for claim in self.claims:
            unknown = [arm for arm in (claim.arm, claim.than) if arm not in self.arms]
            if unknown:
                raise ValueError(f"claims name the arm {unknown[0]!r}; there are {', '.join(self.arms)}")
            if isinstance(claim, Lower) and claim.measure not in self.measures:
                names = ", ".join(measure.name for measure in self.measures)
                raise ValueError(f"claims name the measure {claim.measure.name!r}; measures has {names}")

    @property
    def title(self) -> str:
        """The first line of the docstring."""
        return self.about.strip().splitlines()[0]

    @property
    def timed(self) -> bool:
        """Whether a claim is about time."""
        return any(isinstance(claim, Faster) for claim in self.claims)

    def paragraph(self, name: str) -> str:
        """A paragraph of the docstring, without its name, on one line."""
        found = re.search(rf"^{name}: (.*?)(?=\n\s*\n|\n[A-Z]\w+: |\Z)", self.about, re.DOTALL | re.MULTILINE)
        if found is None:
            raise ValueError(f"about has no paragraph that begins with '{name}: '; a paper's docstring needs one")
        return " ".join(found[1].split())

    def at(self, *, seed: int, smoke: bool = False) -> dict[str, Experiment]:
        """The arms with this seed, or with `smoke` their smallest form: everything runs, nothing is learnt."""
        changes: dict[str, Any] = {"seed": seed}
        if smoke:
            changes |= {"steps": 2, "batch_size": 2, "sequence_length": 16, "evaluation_bytes": 100}
        return {name: dataclasses.replace(_sized(arm, smoke), **changes) for name, arm in self.arms.items()}


class Found(NamedTuple):
    """A paper and where it came from."""

    name: str
    paper: Paper
    file: Path | None
    """A file of the user's own; None: one of ours."""


def paper_names() -> list[str]:
    """Our papers."""
    return sorted(module.name for module in pkgutil.iter_modules(papers.__path__))


def find_paper(named: str) -> Found:
    """A paper of ours by its name, or one of the user's by the path of its file. Nothing is registered.

    Raises:
        ValueError: there is no such paper, or its file cannot be used.
    """
    names = paper_names()
    if named in names:
        return Found(named, importlib.import_module(f"{papers.__name__}.{named}").paper(), None)
    if not named.endswith(".py"):
        raise ValueError(f"paper is {named!r}; there are {', '.join(names)}, or give the path of a Python file")
    paper = call_recipe(Path(named), "paper")
    if not isinstance(paper, Paper):
        raise ValueError(f"recipe {named}: paper() returned {paper!r}; it must return a Paper")
    return Found(Path(named).stem, paper, Path(named))


def _sized(experiment: Experiment, smoke: bool) -> Experiment:
    if not smoke:
        return experiment
    alike = isinstance(experiment.model.ffn, FeedForward)  # or a pattern of layers, which one layer may not show
    layers = min(experiment.model.layers, 1 if alike else 2)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, layers=layers, unroll=1))
