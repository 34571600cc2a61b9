"""Packed arrays as named plain arrays and back: what files such as safetensors hold.

A packed array `w` becomes `w.codes`, `w.scales` and, where it has them, `w.zero_points`; codes of fp8 as their bits in
uint8, for safetensors writes 8-bit floats from JAX, but cannot read them back. What is not an array goes into a
description of strings, the `metadata` of a safetensors file.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from .formats import FORMATS, FP8_E4M3
from .packed import Quantized

PARTS = ("codes", "scales", "zero_points")


def to_arrays(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Take packed arrays apart; other entries stay as they are.

    Returns:
        The arrays by name, and for each packed array's name its format, group size and dtype.

    Raises:
        ValueError: two arrays would have one name.
    """
    arrays, descriptions = {}, {}
    for name, weight in weights.items():
        parts = {name: weight}
        if isinstance(weight, Quantized):
            parts = {f"{name}.{part}": getattr(weight, part) for part in PARTS}
            if weight.format == FP8_E4M3:
                parts[f"{name}.codes"] = weight.codes.view(jnp.uint8)
            descriptions[name] = f"{weight.format.name} group_size={weight.group_size} dtype={weight.dtype}"
        for part, array in parts.items():
            if array is None:
                continue
            if part in arrays:
                raise ValueError(f"weights holds two arrays for the name {part!r}; a name must be one array's")
            arrays[part] = array
    return arrays, descriptions


def from_arrays(arrays: Mapping[str, Any], descriptions: Mapping[str, str] | None) -> dict[str, Any]:
    """Put together what `to_arrays` took apart. Descriptions of names whose codes are not there are others' metadata.

    Raises:
        ValueError: a description cannot be read, or its arrays are missing or do not fit it.
    """
    rest, packed = dict(arrays), {}
    for name, description in (descriptions or {}).items():
        if f"{name}.codes" not in rest:
            continue
        codes, scales, zero_points = (rest.pop(f"{name}.{part}", None) for part in PARTS)
        read = re.fullmatch(r"(\w+) group_size=(\d+) dtype=(float32|bfloat16)", description)
        if read is None or read[1] not in FORMATS:
            raise ValueError(
                f"the description of {name!r} is {description!r}; it must be like 'int4 group_size=64 dtype=float32', "
                f"with a format out of {', '.join(FORMATS)}"
            )
        format, group_size, dtype = FORMATS[read[1]], int(read[2]), jnp.dtype(read[3])
        if format == FP8_E4M3 and codes.dtype == jnp.uint8:
            codes = codes.view(format.dtype)
        weight = Quantized(
            codes=codes, scales=scales, zero_points=zero_points, format=format, group_size=group_size, dtype=dtype
        )
        _check(name, weight)
        packed[name] = weight
    return rest | packed


def _check(name: str, weight: Quantized) -> None:
    """Refuse arrays that do not fit their description."""
    *lead, inner, width = weight.shape if weight.codes.ndim > 1 else (0, 0)
    if weight.codes.ndim < 2 or weight.group_size < 1 or inner % weight.group_size:
        raise ValueError(
            f"{name}.codes is {list(weight.codes.shape)} in groups of {weight.group_size}; it must be a matrix, "
            "whose axis D, the second-last, divides into groups"
        )
    scale_shape = (*lead, inner // weight.group_size, width)
    scale_dtype = jnp.uint8 if weight.format.power_of_two else jnp.float32
    expected = {"codes": (weight.codes.shape, weight.format.dtype), "scales": (scale_shape, scale_dtype)}
    if weight.zero_points is not None:
        expected["zero_points"] = (scale_shape, jnp.int8)
    for part, (shape, dtype) in expected.items():
        array = getattr(weight, part)
        found = None if array is None else (tuple(array.shape), jnp.dtype(array.dtype))
        if found != (tuple(shape), jnp.dtype(dtype)):
            came = "missing" if found is None else f"{found[1]}{list(found[0])}"
            raise ValueError(f"{name}.{part} is {came}; it must be {jnp.dtype(dtype)}{list(shape)}")
