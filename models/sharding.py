"""From logical axis names to a device mesh: the one place that knows how a model is spread.

Parameters carry logical names (`batch, layers, embed, mlp, expert, heads, kv_heads, vocab`); `MeshRules` maps them to
the mesh axes `data, fsdp, expert, tensor`. The model code is the same on one device and on a pod.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ..kernels.quantized import Quantized, check_shards


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each mesh axis has. One axis may be -1: all that the others leave."""

    data: int = -1
    """Copies of the parameters, each with its share of the batch."""
    fsdp: int = 1
    """Parts of each parameter, gathered for use; the batch is split over this axis too."""
    expert: int = 1
    """Parts of the experts; the batch is split over this axis too."""
    tensor: int = 1
    """Parts of each matrix multiplication."""

    def __post_init__(self):
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"MeshShape is {sizes}; each axis must be at least 1, and at most one may be -1 (the rest)"
            )

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh of Auto axes over `devices` (None: all).

        On one slice of a TPU each axis takes whole sides of it, where the slice allows that, so that its devices are
        neighbours, as `dynamoe plan` lays it out. Several slices, GPUs and CPUs are taken in JAX's order, the last axis
        first.

        Raises:
            ValueError: the number of devices does not fit.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, field.name) for field in fields(self)]
        fixed = math.prod(size for size in sizes if size != -1)
        if len(devices) % fixed or (-1 not in sizes and len(devices) != fixed):
            raise ValueError(
                f"mesh is {self}: its fixed axes take {fixed} devices; {len(devices)} are there, and the product of "
                "the axes must equal that"
            )
        sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
        names = tuple(field.name for field in fields(self))
        return Mesh(_arranged(sizes, devices), names, axis_types=(AxisType.Auto,) * len(names))


def _arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    one_slice = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    if devices[0].platform == "tpu" and one_slice and len(devices) > 1:
        try:
            return mesh_utils.create_device_mesh(sizes, devices)
        except (NotImplementedError, ValueError):
            pass  # an axis would have to take a part of a side
    return np.array(devices).reshape(sizes)


@dataclass(frozen=True, kw_only=True)
class MeshRules:
    """The mesh axes that each logical axis is split over; () leaves it whole."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    layers: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str) -> PartitionSpec:
        """The partition of the array `name`, whose dimensions have the logical names `axes` (None: whole).

        Raises:
            ValueError: a logical name or a mesh axis is unknown, a dimension does not divide over its mesh axes, or one
                array claims a mesh axis twice.
        """
        if len(axes) != len(shape):
            raise ValueError(f"{name} has shape {shape} and logical axes {axes}; there must be one name per dimension")
        known = {field.name for field in fields(self)}
        entries: list[tuple[str, ...] | None] = []
        for axis, length in zip(axes, shape, strict=True):
            if axis is not None and axis not in known:
                raise ValueError(f"{name} has the logical axis {axis!r}; known are {sorted(known)}")
            rule = () if axis is None else getattr(self, axis)
            if unknown := [a for a in rule if a not in mesh.shape]:
                raise ValueError(
                    f"MeshRules.{axis} names the mesh axis {unknown[0]!r}; the mesh has {list(mesh.axis_names)}"
                )
            over = tuple(a for a in rule if mesh.shape[a] > 1)
            claims = [a for entry in entries if entry for a in entry] + list(over)
            if twice := sorted({a for a in claims if claims.count(a) > 1}):
                raise ValueError(
                    f"{name} with logical axes {axes} would be split over {twice} twice; a mesh axis may split one "
                    "dimension of an array once"
                )
            parts = math.prod(mesh.shape[a] for a in over)
            if length % parts:
                sizes = {a: mesh.shape[a] for a in over}
                raise ValueError(
                    f"axis {axis!r} of {name} has length {length}; it must be a multiple of {parts} to divide over the "
                    f"mesh axes {sizes}"
                )
            entries.append(over or None)
        return PartitionSpec(*entries)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules to use it."""

    mesh: Mesh
    rules: MeshRules = MeshRules()

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that a batch is split over; those of one device left out."""
        return tuple(axis for axis in self.rules.batch if self.mesh.shape[axis] > 1)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], name: str) -> PartitionSpec:
        """See `MeshRules.spec`."""
        return self.rules.spec(tuple(axes), tuple(shape), self.mesh, name)

    def shardings(self, tree: Any) -> Any:
        """The sharding of every array in a tree of (possibly abstract) arrays.

        A variable's array is split by the logical axes that it carries, and so is an optimizer's array of the same
        variable; everything else is whole on every device. The leaves of a packed weight are split alike.

        Raises:
            ValueError: as `MeshRules.spec` does, or a split would cut the groups of a packed weight; it is named.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())

        def sharding(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, nnx.Variable):
                return whole
            axes, name = leaf.get_metadata().get("axes"), ".".join(str(getattr(key, "key", key)) for key in path)

            def of(array: Any) -> NamedSharding:
                if axes is None or array.ndim == 0:
                    return whole
                return NamedSharding(self.mesh, self.spec(axes, array.shape, name))

            value = leaf.get_value()
            if axes is not None and isinstance(value, Quantized):
                split = NamedSharding(self.mesh, self.spec(axes, value.shape, name))
                check_shards(value, value.shape[-2] // split.shard_shape(value.shape)[-2], name)
            return leaf.replace(jax.tree.map(of, value))

        return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def batch(self, length: int, dimensions: int, name: str = "batch_size") -> NamedSharding:
        """The sharding of an array whose first dimension is a batch of `length`."""
        axes, shape = ("batch", *[None] * (dimensions - 1)), (length, *[1] * (dimensions - 1))
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def constrain(self, activations: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Keep activations split by batch, whatever the parameters that produced them were split by."""
        sharding = self.batch(activations.shape[0], activations.ndim, "activations")
        return jax.lax.with_sharding_constraint(activations, sharding)
