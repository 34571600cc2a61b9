"""The best mesh as a recipe of its own: a file that calls the planned recipe and replaces what is different.

It can be trained, planned, and changed by hand.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ...models import MeshShape
from ..experiment import Experiment
from .target import Target

DEFAULT = "standard_library"
"""The recipe of `experiments.recipes` that stands where none is given."""

_OURS = f"from dynamoe.experiments.recipes import {DEFAULT} as planned\n"
_YOURS = """
# The planned recipe, by its path from this file's folder, which a run's copy of this file has on sys.path.
RECIPE = "{away}"
found = next(Path(place, RECIPE) for place in (Path(__file__).parent, *sys.path) if Path(place, RECIPE).is_file())
sys.path.insert(0, str(found.parent.resolve()))
planned = importlib.import_module(found.stem)
"""


def recipe_name(recipe: Path | None) -> str:
    """What a plan of this recipe is called."""
    return DEFAULT if recipe is None else recipe.stem


def winner_text(file: Path, recipe: Path | None, base: Experiment, experiment: Experiment, target: Target) -> str:
    """The text of a recipe that builds an experiment out of another recipe's.

    Args:
        file: where it will stand.
        recipe: the planned one; None: the standard library's.
        base: what that recipe builds.
        experiment: what the new one has to build.
        target: the devices, for the file's first line.

    Raises:
        ValueError: a difference cannot be written down; it is named.
    """
    names: set[tuple[str, str]] = {("dynamoe.experiments.experiment", "Experiment")}
    changed = _changed(base, experiment, "experiment", names)
    standard = ["import dataclasses"]
    if recipe is None:
        finding = ""
    else:
        standard = ["import dataclasses", "import importlib", "import sys", "from pathlib import Path"]
        finding = _YOURS.format(away=os.path.relpath(recipe.absolute(), file.absolute().parent))
        names.discard(("pathlib", "Path"))
    imports = "\n".join(f"from {module} import {name}" for module, name in sorted(names))
    return (
        f'"""{recipe_name(recipe)} on {target.devices} devices of {target.chip}, {target.topology}: the mesh that '
        f"`dynamoe plan --search` found best.\n\nCommand: dynamoe train {file.name}\n"
        '"""\n\n'
        f"{chr(10).join(standard)}\n\n{imports}\n{_OURS if recipe is None else finding}\n\n"
        "def recipe() -> Experiment:\n    experiment = planned.recipe()\n"
        f"    return {changed}\n"
    )


def _changed(old: Any, new: Any, expression: str, names: set[tuple[str, str]]) -> str:
    """Python that makes `new` out of `old`, for which the expression stands. Collects what it has to import."""
    if type(old) is not type(new) or not dataclasses.is_dataclass(new) or isinstance(new, type):
        return _literal(new, expression, names)
    parts = []
    for name in (field.name for field in dataclasses.fields(new) if field.init):
        before, after = getattr(old, name), getattr(new, name)
        if before != after or isinstance(after, MeshShape):  # the mesh is written whole: it is what the file is for
            inside = f"{expression}.{name}"
            write = _literal(after, inside, names) if isinstance(after, MeshShape) else None
            parts.append(f"{name}={write or _changed(before, after, inside, names)}")
    return f"dataclasses.replace({expression}, {', '.join(parts)})"


def _literal(value: Any, expression: str, names: set[tuple[str, str]]) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Path):
        names.add(("pathlib", "Path"))
        return f"Path({str(value)!r})"
    if type(value) is tuple:
        return f"({''.join(f'{_literal(part, expression, names)}, ' for part in value)})"
    kind = type(value)
    if dataclasses.is_dataclass(value) and "." in kind.__module__:  # of a package, not of the recipe file
        public = kind.__module__.rpartition(".")[0] if isinstance(value, MeshShape) else kind.__module__
        names.add((public, kind.__qualname__))
        fields = (
            f"{field.name}={_literal(getattr(value, field.name), f'{expression}.{field.name}', names)}"
            for field in dataclasses.fields(value)
            if field.init
        )
        return f"{kind.__qualname__}({', '.join(fields)})"
    raise ValueError(
        f"{expression} is {value!r}, which cannot be written into the recipe of the best mesh; put it into the recipe "
        "instead of the command line"
    )
