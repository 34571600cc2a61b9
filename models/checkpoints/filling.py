"""A model without numbers, and the tensors of files: the numbers go where they belong, on one device or on a mesh.

Beside the arrays that stay, the host holds one tensor of the file at a time, and the piece of it that is under way; on
one CPU two tensors.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..decoder import DecoderLM
from ..quantization import set_variable
from ..sharding import Layout
from .arrays import Place, array_of, places_of, shape_of, wanted_dtype
from .folder import Source
from .mapping import FileTensor, covered
from .tensor_files import Entry
from .turning import aligned, contiguous, copy

Leaf = tuple[tuple[Any, ...], str | None]
TENSORS_AT_ONCE = 2
"""That are read and turned on one CPU, each in a thread: more memory than twice the largest is not promised."""


Finish = Callable[[tuple[Any, ...], nnx.Variable], nnx.Variable]
"""Makes of a variable that is filled, and of its path, the one that is kept in its place."""


def filled(
    model: DecoderLM,
    tensors: list[FileTensor],
    source: Source,
    layout: Layout | None,
    dtype: np.dtype,
    finish: Finish | None = None,
) -> DecoderLM:
    """The abstract model with the numbers of the files.

    Args:
        model: with shapes in place of arrays.
        tensors: of the files, with the places that they belong to.
        source: the files.
        layout: the mesh; None: the default device.
        dtype: of the parameters.
        finish: called as soon as a parameter is whole; what it was filled in is then given up.

    Raises:
        ValueError: an array does not divide over the mesh, before anything is read; or a tied head is another than the
            embedding.
        OSError: a file cannot be read.
    """
    graph, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    places = places_of(model)
    sizes = covered(tensors)
    for path, place in places.items():
        shape = shape_of(array_of(variables[place.variable].get_value(), place.part), place)
        assert sizes.pop(path, None) == math.prod(shape), f"the family's tensors do not fill {path} {shape}"
    assert not sizes, f"the family's tensors fill what the model does not have: {sorted(sizes)}"
    shardings = _shardings(state, layout)
    order = sorted(tensors, key=lambda tensor: _position(source.entries.get(tensor.name)))
    largest = max(entry.bytes for entry in source.entries.values())
    filler = _Filler(variables, places, shardings, dtype, largest, finish)

    def fill(tensor: FileTensor) -> None:
        entry = source.entries.get(tensor.name)
        if entry is None:
            return  # a repetition that the files spare
        if tensor.same_as is not None:
            _check_same(entry, source.entries[tensor.same_as])
        else:
            filler.fill(tensor, entry)

    with ThreadPoolExecutor(len(filler.spaces)) as threads:
        try:
            for _ in threads.map(fill, order):
                pass
        finally:
            threads.shutdown(cancel_futures=True)  # the first error ends all
    model = nnx.merge(graph, nnx.from_flat_state(filler.variables()))
    for path, variable in filler.finished.items():
        set_variable(model, path, variable)
    return model


def _position(entry: Entry | None) -> tuple[str, int]:
    return ("", 0) if entry is None else (str(entry.path), entry.offset)


def _check_same(entry: Entry, other: Entry) -> None:
    if entry.dtype != other.dtype or not np.array_equal(entry.read().view(np.uint8), other.read().view(np.uint8)):
        raise ValueError(
            f"{entry.name} differs from {other.name}, and config.json says that the two are tied: they must be the same"
        )


def _shardings(state: nnx.State, layout: Layout | None) -> dict[tuple[Any, ...], Any]:
    if layout is None:
        return {}
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(layout.shardings(state))}


class _Filler:
    """Arrays that fill up, piece by piece; the largest tensor has so many bytes.

    On one CPU an array fills up in memory that JAX then takes over as it is; elsewhere on the devices.
    """

    def __init__(
        self,
        variables: dict,
        places: dict[str, Place],
        shardings: dict,
        dtype: np.dtype,
        largest: int,
        finish: Finish | None,
    ):
        self.abstract, self.places, self.shardings, self.dtype = variables, places, shardings, dtype
        self.finish, self.finished = finish, {}
        self.left = {place.leaf: _size(variables, place) for place in places.values()}
        """Numbers that each array still lacks."""
        self.on_cpu = not shardings and jax.default_backend() == "cpu"
        self.leaves: dict[Leaf, Any] = {}
        # While one tensor is read, the other is turned; devices take them one by one.
        self.spaces = [np.empty(largest, np.uint8) for _ in range(TENSORS_AT_ONCE if self.on_cpu else 1)]
        self.lock, self.part_space = threading.Lock(), aligned(0)

    def fill(self, tensor: FileTensor, entry: Entry) -> None:
        """Read a tensor and put it where its pieces belong."""
        with self.lock:
            space = self.spaces.pop()
        try:
            self._fill(tensor, entry.read(space))
        finally:
            with self.lock:
                self.spaces.append(space)

    def _fill(self, tensor: FileTensor, array: np.ndarray) -> None:
        for piece in tensor.pieces:
            place = self.places[piece.path]
            variable = self.abstract[place.variable]
            shape = array_of(variable.get_value(), place.part).shape
            dtype = wanted_dtype(variable, place.part, self.dtype)
            put = self._put_in_memory if self.on_cpu else self._put_on_devices
            seen = piece.view(array)
            put(place, (*place.repeat, *piece.index), piece.start, seen, shape, dtype)
            with self.lock:
                self.left[place.leaf] -= seen.size
                if self.finish is not None and not self.left[place.leaf] and type(variable) is nnx.Param:
                    whole = variable.replace(self._given(self.leaves.pop(place.leaf)))
                    self.finished[place.variable] = self.finish(place.variable, whole)
                    del whole

    def _put_in_memory(
        self,
        place: Place,
        index: tuple[int, ...],
        start: int,
        seen: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        with self.lock:
            if place.leaf not in self.leaves:
                self.leaves[place.leaf] = aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
            target = self.leaves[place.leaf][index]
        copy(seen, target[..., start : start + seen.shape[-1]])

    def _put_on_devices(
        self,
        place: Place,
        index: tuple[int, ...],
        start: int,
        seen: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        sharding = array_of(self.shardings[place.variable], place.part) if self.shardings else None
        if seen.shape == shape:
            self.leaves[place.leaf] = _part(seen, dtype, sharding, 0, None)
        else:
            size = seen.size * dtype.itemsize
            if self.part_space.size < size:
                self.part_space = aligned(size)
            part = _part(seen, dtype, sharding, len(index), self.part_space)
            leaf = self.leaves.get(place.leaf)
            leaf = _zeros(shape, dtype, sharding) if leaf is None else leaf
            starts = (*index, *[0] * (len(shape) - len(index) - 1), start)
            self.leaves[place.leaf] = _update(leaf, part, np.array(starts, np.int32))
        # Else tensors would queue up in memory faster than they are copied; and the next one uses the same memory.
        jax.block_until_ready(self.leaves[place.leaf])

    def _given(self, array: Any) -> jax.Array:
        """A full array as JAX's own."""
        return jax.device_put(array) if self.on_cpu else array

    def variables(self) -> dict[tuple[Any, ...], nnx.Variable]:
        """The variables with their arrays."""
        done = {}
        self.leaves = {leaf: self._given(array) for leaf, array in self.leaves.items()}
        for path, variable in self.abstract.items():
            value = variable.get_value()
            if path in self.finished:
                done[path] = variable
                continue
            if (path, None) in self.leaves:
                value = self.leaves[path, None]
            else:
                value = dataclasses.replace(value, codes=self.leaves[path, "codes"], scales=self.leaves[path, "scales"])
            done[path] = variable.replace(value)
        return done


def _size(variables: dict, place: Place) -> int:
    """Numbers of the whole array that a place is in."""
    return math.prod(array_of(variables[place.variable].get_value(), place.part).shape)


def _part(
    seen: np.ndarray, dtype: np.dtype, sharding: NamedSharding | None, leading: int, space: np.ndarray | None
) -> jax.Array:
    """A piece on the devices in a dtype, made in `space` or in memory of its own. On a mesh each device gets its share
    alone, without the `leading` axes of the array that the piece is one entry of."""
    if sharding is None:
        return jax.device_put(contiguous(seen, dtype, space))
    spec = (*sharding.spec, *[None] * (seen.ndim + leading - len(sharding.spec)))[leading:]
    own = NamedSharding(sharding.mesh, _dividing(PartitionSpec(*spec), seen.shape, sharding))
    return jax.make_array_from_callback(seen.shape, own, lambda index: contiguous(seen[index], dtype))


def _dividing(spec: PartitionSpec, shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """The split, but whole along axes of which the piece is a part that does not divide."""
    entries = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in entry) for entry in entries]
    pairs = zip(entries, parts, shape, strict=True)
    return PartitionSpec(*[entry if entry and length % count == 0 else None for entry, count, length in pairs])


def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    return _zeros_on(sharding)(shape, dtype)


@functools.lru_cache(maxsize=64)
def _zeros_on(sharding: NamedSharding | None) -> Any:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _update(leaf: jax.Array, part: jax.Array, starts: np.ndarray | jax.Array) -> jax.Array:
    """Write a part into an array in place; its place is no constant, so that one program serves all experts."""
    part = part.reshape(*[1] * (leaf.ndim - part.ndim), *part.shape)
    return jax.lax.dynamic_update_slice(leaf, part, list(starts))
