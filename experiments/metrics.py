"""What a run measures, step by step: `metrics.jsonl` and TensorBoard."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .files import read_text, write_atomically
from .places import Place, is_remote, upload

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"

UPLOADED_EVERY = 60.0
"""Seconds after which a line takes the files to a remote directory, where nothing else did."""


class Metrics:
    """Writes measurements to `metrics.jsonl` and to TensorBoard. Only process 0 makes one.

    A line is `{"step": 100, "split": "train", "loss": 1.5}`; a number that is not finite is the string "nan", "inf" or
    "-inf". An array is a list, nested as it is; TensorBoard gets the plain numbers alone. Each line is flushed. On
    resume, what the earlier run measured after the checkpoint is cut, here and in TensorBoard: it is measured again.

    An object store cannot append. For a remote directory the files are kept on this machine and uploaded whole: by
    `upload`, which the training calls before each checkpoint, with a line about held-out text, with a line a minute
    after the last time, and at the end. So the lines up to a checkpoint are always there.
    """

    def __init__(self, path: Place, resume_step: int | None = None, before_upload: Callable[[], None] = lambda: None):
        """Opens a run's metrics.

        Args:
          path: the run's directory.
          resume_step: the step of the restored checkpoint: lines up to it stay. None starts afresh and keeps none.
          before_upload: called before each upload, to stop it: the check of `RunDirectory.lock`.

        Raises:
          ValueError: a line of metrics.jsonl, other than the last, is damaged.
        """
        from tensorboardX import SummaryWriter

        self._path, self._before_upload, self._uploaded, self._is_new = path, before_upload, 0.0, True
        self._stand_in = tempfile.TemporaryDirectory(prefix="dynamoe-") if is_remote(path) else None
        folder = Path(path if self._stand_in is None else self._stand_in.name)
        file = folder / METRICS
        last = -1 if resume_step is None else resume_step
        lines = read_metrics(path) if (path / METRICS).exists() else []
        kept = [line for line in lines if line["step"] <= last]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(_as_line(line) for line in kept))
        self._file = file.open("a", encoding="utf-8")
        # Two writers of one second and machine would overwrite each other's file: number the files.
        number = len(list((path / TENSORBOARD).glob("*")))
        board = str(folder / TENSORBOARD)
        self._board = SummaryWriter(board, purge_step=last + 1, filename_suffix=f".{number:04}")
        self.upload()

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
        self._is_new = True
        for name, number in numbers.items():
            if isinstance(number, float):
                self._board.add_scalar(f"{split}/{name}", number, int(step))
        self._board.flush()
        if split == "held_out" or time.monotonic() > self._uploaded + UPLOADED_EVERY:
            self.upload()

    def upload(self) -> None:
        """Takes what was written so far to a remote directory; a local one has it already.

        Raises:
          ValueError: from `before_upload`.
        """
        if self._stand_in is not None and self._is_new:
            self._before_upload()
            upload(Path(self._stand_in.name), self._path)
            self._uploaded, self._is_new = time.monotonic(), False

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._stand_in is not None:
            with self._stand_in:
                self.upload()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Place) -> list[dict[str, Any]]:
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
    lines = read_text(file).split("\n")
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
