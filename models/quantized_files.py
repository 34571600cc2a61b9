"""A model with packed weights on disk: a folder that is there whole or not at all, and holds no code.

weights.safetensors   every variable; packed ones as `kernels.quantized.to_arrays` names their parts
weights.json          how they are packed, the form of the layers, and a checksum of the other file
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..kernels.quantized import Quantized, from_arrays, to_arrays
from ..moe import QuantizedWeight
from .decoder import Decoder, DecoderLM
from .quantization import Form, form_of, set_variable

WEIGHTS, DESCRIPTION = "weights.safetensors", "weights.json"
VERSION = 1


def save_quantized(model: DecoderLM, path: Path) -> None:
    """Write a model's variables into a new folder. Its configuration is not among them.

    Args:
        model: as `quantize_model` returns it, stacked or unstacked, on this process's devices.
        path: the folder. It appears when it is complete; an interrupted save leaves `.NAME.tmp` beside it, which the
            next one removes.

    Raises:
        ValueError: the folder is there already.
    """
    from safetensors.flax import save_file

    if path.exists():
        raise ValueError(f"{path}: it is there already; give a new folder")
    values = {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
    arrays, packed = to_arrays(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(arrays, temporary / WEIGHTS)
    description = {
        "version": VERSION,
        "stacked": any(segment.repeats > 1 for segment in model.segments),
        "packed": packed,
        "bytes": (temporary / WEIGHTS).stat().st_size,
        "sha256": _checksum(temporary / WEIGHTS),
    }
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for file in (temporary / WEIGHTS, temporary / DESCRIPTION, temporary):
        _to_disk(file)
    temporary.rename(path)
    _to_disk(path.parent)


def load_quantized(
    path: Path,
    config: Decoder,
    *,
    dtype: np.dtype | None = None,
    prepare: Callable[[DecoderLM], DecoderLM] = lambda model: model,
) -> DecoderLM:
    """Read what `save_quantized` wrote, on the first device; the weights are never there unpacked.

    Args:
        path: the folder.
        config: the model's configuration.
        dtype: of parameters, and what packed weights stand for; None: as they were saved.
        prepare: makes of a fresh model, without numbers, what was saved but for what the file says is packed.

    Raises:
        ValueError: there is no such folder, its files are damaged or of another version, or the model has other
            variables: every missing, extra and differing one is listed.
    """
    description = _description(path)
    stacked, packed = description["stacked"], description["packed"]
    values = from_arrays(_read(path / WEIGHTS, description), packed)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype.name)
    model = nnx.eval_shape(lambda: prepare(config.build(jax.random.key(0), stacked=stacked)))
    variables = {_name(place): (place, variable) for place, variable in nnx.to_flat_state(nnx.state(model))}
    for name in values:
        # What routers remember keeps its own dtype.
        if dtype is not None and name in variables and isinstance(variables[name][1], nnx.Param | QuantizedWeight):
            place, variable = variables[name]
            values[name] = values[name].astype(dtype)
            wanted = variable.get_value()
            variables[name] = (
                place,
                variable.replace(
                    wanted.astype(dtype) if isinstance(wanted, Quantized) else jax.ShapeDtypeStruct(wanted.shape, dtype)
                ),
            )
    forms = {name: form_of(model, *variables[name]) for name in packed if name in variables}
    problems = [f"{name} is missing" for name in variables if name not in values]
    problems += [f"{name} is not the model's" for name in values if name not in variables]
    for name, (_, variable) in variables.items():
        if name in values and (problem := _misfit(values[name], variable, forms.get(name))):
            problems.append(f"{name} {problem}")
    if problems:
        raise ValueError(f"{path} holds weights of another model:" + "".join(f"\n- {problem}" for problem in problems))
    for name, (place, variable) in variables.items():
        form = forms.get(name)
        set_variable(model, place, variable.replace(values[name]) if form is None else form.to_variable(values[name]))
    return model


def _misfit(value: Any, variable: nnx.Variable, form: Form | None) -> str | None:
    """What is wrong with a value that is to take a variable's place."""
    expected = variable.get_value()
    if not isinstance(value, Quantized):
        found, wanted = ((tuple(array.shape), jnp.dtype(array.dtype)) for array in (value, expected))
        return None if found == wanted else f"is {found[1]}{list(found[0])}; the model has {wanted[1]}{list(wanted[0])}"
    if form is None:
        return "is packed; its module does not multiply with packed weights"
    if value.shape != form.shape or value.dtype != expected.dtype:
        return f"is packed {value.dtype}{list(value.shape)}; the model has {expected.dtype}{list(form.shape)}"
    return None


def _description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"{path}: there are no packed weights, {DESCRIPTION} is missing")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: it is no JSON, the file is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("version") != VERSION:
        version = description.get("version") if isinstance(description, dict) else None
        raise ValueError(f"{file} is of version {version!r}; this dynamoe reads version {VERSION}")
    kinds = {"stacked": bool, "packed": dict, "bytes": int, "sha256": str}
    if wrong := [name for name, kind in kinds.items() if not isinstance(description.get(name), kind)]:
        raise ValueError(f"{file} has no {wrong[0]} of type {kinds[wrong[0]].__name__}; the file is damaged")
    if not all(isinstance(text, str) for text in description["packed"].values()):
        raise ValueError(f"{file}: packed must hold texts; the file is damaged")
    return description


def _read(file: Path, description: dict[str, Any]) -> dict[str, jax.Array]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    size, expected = file.stat().st_size, description["bytes"]
    if size != expected:
        raise ValueError(f"{file} has {size} bytes; {DESCRIPTION} says {expected}, the file is damaged")
    if _checksum(file) != description["sha256"]:
        raise ValueError(f"{file}: its checksum is not that of {DESCRIPTION}, the file is damaged")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
