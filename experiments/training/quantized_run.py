"""A run that holds packed weights in place of checkpoints: what `dynamoe compress` writes.

config.json, recipe.py, environment.json   those of the run that was compressed
quantized/                                 see models/quantized_files.py
compression.json                           from which run and step, what became of each parameter, what was measured
"""

import json
from pathlib import Path
from typing import Any

from ...models import Decoder, DecoderLM
from ...models.quantized_files import load_quantized, save_quantized
from ..files import read_json, write_atomically
from ..places import Place, absolute, is_remote
from ..run_directory import CONFIG, ENVIRONMENT, QUANTIZED, RECIPE

COMPRESSION = "compression.json"


def save_quantized_run(model: DecoderLM, output: Path, *, source: Place, step: int, facts: dict[str, Any]) -> None:
    """Write a packed model into a new run directory. It is a run once its config.json stands, which comes last.

    Args:
        model: packed.
        output: the directory; new or empty.
        source: the run that the model comes from.
        step: of its checkpoint.
        facts: what else to remember, in plain values.

    Raises:
        ValueError: the directory holds something.
    """
    check_is_free(output)
    record = json.dumps({"source": str(absolute(source)), "step": step, **facts}, indent=2, allow_nan=False)
    save_quantized(model, output / QUANTIZED)
    write_atomically(output / COMPRESSION, record + "\n")
    for file in (ENVIRONMENT, RECIPE, CONFIG):
        if (source / file).is_file():
            write_atomically(output / file, (source / file).read_bytes().decode())


def load_quantized_run(path: Place, config: Decoder) -> tuple[DecoderLM, int]:
    """The packed model of a run, and the step of the checkpoint that it comes from.

    Raises:
        ValueError: see `load_quantized`; or the run is in a store, or compression.json is damaged.
    """
    path = checked_local(path)
    file = path / COMPRESSION
    if not file.is_file():
        raise ValueError(
            f"{path} holds packed weights and no {COMPRESSION}; give a run that `dynamoe compress` finished"
        )
    record = read_json(file)
    if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
        raise ValueError(f"{file} names no step; the file is damaged")
    return load_quantized(path / QUANTIZED, config), record["step"]


def checked_local(path: Place) -> Path:
    """Refuse a run of packed weights in a store."""
    if is_remote(path):
        raise ValueError(f"run directory {path}: packed weights must lie in a directory that this machine mounts")
    return Path(path)


def check_is_free(output: Path) -> None:
    """Refuse a directory that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output}: it is there already and not empty; give a new directory")
