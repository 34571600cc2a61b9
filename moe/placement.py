"""How tokens and weights lie on a mesh of devices: what a dispatcher has to know to run on each device by itself.

`models.Layout` is one. Without one a layer leaves all of it to XLA.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jax.sharding import Mesh, PartitionSpec


@runtime_checkable
class Placement(Protocol):
    """A mesh, and which of its axes split what."""

    @property
    def mesh(self) -> Mesh:
        """The devices by mesh axis."""
        ...

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that tokens are split over, the first the slowest; those of one device left out."""
        ...

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], name: str) -> PartitionSpec:
        """The mesh axes of each dimension of the array `name`, whose dimensions have the logical names `axes`.

        Raises:
            ValueError: a dimension does not divide.
        """
        ...
