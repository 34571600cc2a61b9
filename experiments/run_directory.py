"""A run's directory: `runs/<name>/` with its configuration, recipe, environment, metrics and checkpoints.

It may lie in an object store, `gs://bucket/run`: see places.py, and run_lock.py for what the lock gives there.

config.json        the configuration; a directory with this file is a run
recipe.py          the recipe file it was started from, if one; older texts of it as recipe-1.py, ...
environment.json   one entry per start: versions, devices, data
metrics.jsonl      one line per measurement, and the same for TensorBoard in tensorboard/
checkpoints/       see training/checkpoints.py
lock.json          in an object store alone, while a process trains
quantized/         instead of these: packed weights, see training/quantized_run.py
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .files import read_json, read_text, write_atomically
from .metrics import Metrics as Metrics
from .metrics import read_metrics as read_metrics
from .places import Place, check_place, is_remote, store_errors
from .run_lock import LOCK, hold
from .serialization import changes, differences, from_json, load_recipe, to_json

CONFIG, RECIPE, ENVIRONMENT = "config.json", "recipe.py", "environment.json"
QUANTIZED = "quantized"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "dynamoe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """One run's directory.

    Attributes:
      path: the directory.
      config: the run's configuration.
      continued: True if the run was there before.
      recipe: the module of its recipe file, where `load` read one.
    """

    path: Place
    config: Any
    continued: bool
    recipe: types.ModuleType | None = None

    @property
    def checkpoints(self) -> Place:
        return self.path / "checkpoints"

    @classmethod
    def open(
        cls,
        path: Place,
        config: Any,
        recipe_path: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        free_fields: Sequence[str] = (),
        fixed_facts: Sequence[str] = (),
    ) -> "RunDirectory":
        """Starts a run in a new or empty directory, or continues the run that is there.

        Every process calls it; process 0 alone reads and writes.

        Args:
          path: the directory, `etils.epath.Path("gs://bucket/run")` for a remote one.
          config: the configuration, see `serialization.to_json`.
          recipe_path: the recipe file that built it.
          facts: what else to remember in environment.json, such as the description of the data set.
          free_fields: fields such as `steps` or `data.workers` that may differ from the stored configuration; the new
            value is stored.
          fixed_facts: facts that must be those of the run's first start, such as the hash of its text.

        Raises:
          ValueError: the directory holds another configuration's run or something else, a fixed fact has changed, or
            the configuration cannot be stored, or the store does not answer. Nothing was written.
          ImportError: a package for the store is missing.
        """
        path = check_place(path)
        data = to_json(config)
        entry = json.loads(json.dumps({**environment(), **(facts or {})}, default=str))
        if recipe_path is not None:
            entry["recipe"] = str(recipe_path.absolute())

        def on_disk() -> bool:
            with store_errors(path):
                continued = _check_can_hold(path, data, free_fields)
                if continued:
                    _check_facts(path, entry, fixed_facts)
                _write_run(path, data, recipe_path, entry)
            return continued

        return cls(path=path, config=config, continued=_on_process_zero(on_disk))

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        """Holds the run for this process, or for the job whose process 0 this is; every process calls it.

        Yields:
          A function that raises ValueError where another process has taken over the lock of a remote directory.

        Raises:
          ValueError: another process holds it.
        """
        with contextlib.ExitStack() as stack:
            checks: list[Callable[[], None]] = []

            def acquire() -> bool:
                checks.append(stack.enter_context(hold(self.path)))
                return True

            _on_process_zero(acquire)
            yield checks[0] if checks else lambda: None

    @classmethod
    def load(cls, path: Place) -> "RunDirectory":
        """Reads a run back, to evaluate it or to generate from it.

        Raises:
          ValueError: there is no run, or its config.json or recipe.py cannot be read.
          ImportError: a package for the store is missing.
        """
        path = check_place(path)
        with store_errors(path):
            if not is_remote(path) and not path.is_dir():
                raise ValueError(f"run directory {path}: no such directory")
            if not (path / CONFIG).is_file():
                raise ValueError(f"run directory {path}: it is no run, there is no {CONFIG} in it")
            data = read_json(path / CONFIG)
            recipe = _load_recipe_of(path) if (path / RECIPE).is_file() else None
        try:
            config = from_json(data, recipe)
        except ValueError as error:
            raise ValueError(f"{path / CONFIG}: {error}") from error
        return cls(path=path, config=config, continued=True, recipe=recipe)


def runs_in(root: Path) -> list[Path]:
    """The runs in `root` and in folders of it, as the demo's two are."""
    return [file.parent for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}") for file in root.glob(pattern)]


def is_quantized(run: Place) -> bool:
    """Whether a run holds packed weights in place of checkpoints."""
    return (run / QUANTIZED).is_dir()


def newest_run(root: Path, *, with_checkpoints: bool = False) -> Path:
    """Of `runs_in(root)` the one that was started or continued last.

    Args:
      root: the folder of the runs.
      with_checkpoints: leave out those that hold packed weights alone.

    Raises:
      ValueError: there is no run in `root`.
    """
    runs = [run for run in runs_in(root) if not (with_checkpoints and is_quantized(run))]
    if not runs:
        raise ValueError(f"{root.absolute()}: there is no run in it; start one, or give a run's directory")

    def last_start(run: Path) -> int:
        file = run / ENVIRONMENT
        return (file if file.exists() else run / CONFIG).stat().st_mtime_ns

    return max(runs, key=last_start)


def environment() -> dict[str, Any]:
    """Says where a run happens: time, versions of Python and of the packages, platform and devices."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _check_can_hold(path: Place, data: dict[str, Any], free_fields: Sequence[str]) -> bool:
    if path.exists() and not path.is_dir():
        raise ValueError(f"run directory {path}: it is a file; give a directory")
    found = [file.name for file in path.iterdir() if not _is_leftover(file.name)] if path.exists() else []
    if not found:
        return False
    if CONFIG not in found:
        raise ValueError(
            f"run directory {path}: it is not empty and no run, it holds {sorted(found)[:5]}; give a new directory"
        )
    if is_quantized(path):
        raise ValueError(
            f"run directory {path}: it holds packed weights, which cannot be trained; give a new directory"
        )
    stored = read_json(path / CONFIG)
    fixed = [field for field, _, _ in changes(stored, data) if not _is_free(field, free_fields)]
    if fixed:
        lines = [line for line in differences(stored, data) if line.split(":")[0] in fixed]
        raise ValueError(
            f"run directory {path}: it holds a run of another configuration ({'; '.join(lines)}); "
            "give another directory, or the same configuration"
        )
    return True


def _check_facts(path: Place, entry: dict[str, Any], fixed_facts: Sequence[str]) -> None:
    file = path / ENVIRONMENT
    first = read_json(file)[0] if file.exists() else entry
    changed = [name for name in fixed_facts if first.get(name) != entry.get(name)]
    if changed:
        lines = [f"{name} was {first.get(name)}, is now {entry.get(name)}" for name in changed]
        raise ValueError(
            f"run directory {path}: it cannot be continued exactly ({'; '.join(lines)}); give another directory, or "
            "bring back what the run began with"
        )


def _is_free(field: str, free_fields: Sequence[str]) -> bool:
    return any(field == free or field.startswith((f"{free}.", f"{free}[")) for free in free_fields)


def _is_leftover(name: str) -> bool:
    """Not of a run: what a kill left, and in a store the empty name of a folder itself."""
    return name in ("", LOCK) or (name.startswith(".") and name.endswith(".tmp"))


def _write_run(path: Place, data: dict[str, Any], recipe_path: Path | None, entry: dict[str, Any]) -> None:
    if not is_remote(path):  # a store has no folders
        path.mkdir(parents=True, exist_ok=True)
    # config.json first: it makes the directory a run, and a start that was cut short here can be continued.
    write_atomically(path / CONFIG, json.dumps(data, indent=2, allow_nan=False) + "\n")
    if recipe_path is not None:
        _copy_recipe(recipe_path, path / RECIPE)
    file = path / ENVIRONMENT
    earlier = read_json(file) if file.exists() else []
    write_atomically(file, json.dumps([*earlier, entry], indent=2) + "\n")


def _copy_recipe(source: Path, target: Place) -> None:
    text = source.read_text(encoding="utf-8")
    if target.exists():
        old = read_text(target)
        if old == text:
            return
        number = 1 + sum(1 for _ in target.parent.glob("recipe-*.py"))
        write_atomically(target.with_name(f"recipe-{number}.py"), old)
    write_atomically(target, text)


def _load_recipe_of(path: Place) -> types.ModuleType:
    """The module of a run's recipe. A run of `dynamoe reproduce` keeps its paper's file, which defines no recipe()."""
    file, folder = path / RECIPE, _folder_of_original(path)
    if not is_remote(path):
        return load_recipe(Path(file), folder, function=None)
    with tempfile.TemporaryDirectory(prefix="dynamoe-") as local:
        copy = Path(local) / RECIPE
        copy.write_bytes(file.read_bytes())
        try:
            return load_recipe(copy, folder, function=None)
        finally:
            sys.path[:] = [entry for entry in sys.path if entry != local]


def _folder_of_original(path: Place) -> Path | None:
    file = path / ENVIRONMENT
    entries = read_json(file) if file.exists() else []
    originals = [Path(entry["recipe"]).parent for entry in entries if "recipe" in entry]
    return originals[-1] if originals and originals[-1].is_dir() else None


def _on_process_zero(function: Callable[[], bool]) -> bool:
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    result, problem = False, None
    if jax.process_index() == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = error
    # The others must learn of a refusal, or they would wait for process 0 for ever.
    outcome = int(multihost_utils.broadcast_one_to_all(np.int32(2 if problem else result)))
    if problem is not None:
        raise problem
    if outcome == 2:
        raise ValueError("run directory: process 0 refused it; its message says why")
    return bool(outcome)
