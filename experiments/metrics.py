"""What a run measures, step by step: `metrics.jsonl` and TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .files import write_atomically

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes measurements to `metrics.jsonl` and to TensorBoard. Only process 0 makes one.

    A line is `{"step": 100, "split": "train", "loss": 1.5}`; a number that is not finite is the string "nan", "inf" or
    "-inf". An array is a list, nested as it is; TensorBoard gets the plain numbers alone. Each line is flushed. On
    resume, what the earlier run measured after the checkpoint is cut, here and in TensorBoard: it is measured again.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """Opens a run's metrics.

        Args:
          path: the run's directory.
          resume_step: the step of the restored checkpoint: lines up to it stay. None starts afresh and keeps none.

        Raises:
          ValueError: a line of metrics.jsonl, other than the last, is damaged.
        """
        from tensorboardX import SummaryWriter

        file = path / METRICS
        last = -1 if resume_step is None else resume_step
        lines = read_metrics(path) if file.exists() else []
        kept = [line for line in lines if line["step"] <= last]
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(_as_line(line) for line in kept))
        self._file = file.open("a", encoding="utf-8")
        # Two writers of one second and machine would overwrite each other's file: number the files.
        number = len(list((path / TENSORBOARD).glob("*")))
        board = str(path / TENSORBOARD)
        self._board = SummaryWriter(board, purge_step=last + 1, filename_suffix=f".{number:04}")

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
          step: the optimizer steps done so far.
          split: "train", "held_out", ...
          values: the measurements by name; anything that `float` takes, arrays, and lists of these.

        Raises:
          ValueError: a measurement is called `step` or `split`.
        """
        if taken := {"step", "split"} & set(values):
            raise ValueError(f"values has {sorted(taken)}; these names are taken, give the measurement another one")
        numbers = {name: _as_numbers(value) for name, value in values.items()}
        self._file.write(_as_line({"step": int(step), "split": split, **numbers}))
        self._file.flush()
        for name, number in numbers.items():
            if isinstance(number, float):
                self._board.add_scalar(f"{split}/{name}", number, int(step))
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a run's `metrics.jsonl`; a last line that a kill cut short is left out.

    Args:
      path: the run's directory.

    Returns:
      One dictionary per line: `step` (int), `split` (str) and the measurements (float, or lists of floats).

    Raises:
      ValueError: there is no such file, or a line before the last is damaged.
    """
    file = path / METRICS
    if not file.is_file():
        raise ValueError(f"{file}: no such file; nothing was measured yet, or {path} is no run")
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    result = []
    for number, text in enumerate(lines[:-1], start=1):  # what follows the last line end is torn, or empty
        try:
            line = json.loads(text)
            step, split = line.pop("step"), line.pop("split")
            result.append({"step": int(step), "split": str(split), **{k: _as_numbers(v) for k, v in line.items()}})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {text[:60]!r} is no measurement; delete that line") from error
    return result


def _as_numbers(value: Any) -> Any:
    """A float, or nested lists of floats."""
    value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    return [_as_numbers(entry) for entry in value] if isinstance(value, list | tuple) else float(value)


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(_spelled_out(line), allow_nan=False) + "\n"


def _spelled_out(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _spelled_out(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_spelled_out(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
