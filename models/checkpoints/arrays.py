"""The arrays of a model by the paths that families use: "layers.3.attention.query", stacked or not."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ...kernels.quantized import Quantized
from ..decoder import DecoderLM

Path = tuple[Any, ...]


class Place(NamedTuple):
    """Where an array of the unstacked model is."""

    variable: Path
    """Path of the variable."""
    part: str | None
    """Of a packed weight: "codes" or "scales"."""
    repeat: tuple[int, ...]
    """Of a stacked layer: its place on the leading axis; else nothing."""

    @property
    def leaf(self) -> tuple[Path, str | None]:
        """Which array it is a part of."""
        return self.variable, self.part


def places_of(model: DecoderLM) -> dict[str, Place]:
    """Every array of a model, abstract or not, by its path in an unstacked one."""
    first, starts = 0, []
    for segment in model.segments:
        starts.append(first)
        first += segment.depth
    found: dict[str, Place] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        parts = ("codes", "scales") if isinstance(variable.get_value(), Quantized) else (None,)
        for part in parts:
            tail = "" if part is None else f".{part}"
            if path[0] != "segments":
                found[".".join(map(str, path)) + tail] = Place(path, part, ())
                continue
            number: Any = path[1]
            segment = model.segments[number]
            for repeat in range(segment.repeats):
                layer = starts[number] + repeat * len(segment.unit.layers) + path[4]  # segments.N.unit.layers.OFFSET
                name = ".".join(map(str, ("layers", layer, *path[5:]))) + tail
                found[name] = Place(path, part, (repeat,) if segment.repeats > 1 else ())
    return found


def array_of(value: Any, part: str | None) -> Any:
    """The array of a variable, or a part of its packed weight."""
    return value if part is None else getattr(value, part)


def wanted_dtype(variable: nnx.Variable, part: str | None, dtype: np.dtype) -> np.dtype:
    """Parameters take the asked dtype; packed weights and what routers remember keep their own."""
    return (
        dtype if type(variable) is nnx.Param and part is None else np.dtype(array_of(variable.get_value(), part).dtype)
    )


def shape_of(array: Any, place: Place) -> tuple[int, ...]:
    """Of one layer's array."""
    return tuple(array.shape[len(place.repeat) :])


def sharding_of(shardings: Any, part: str | None) -> jax.sharding.NamedSharding:
    return array_of(shardings, part)
