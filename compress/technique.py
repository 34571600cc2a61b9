"""What a compression technique is. Letters: D the axis that products sum over, F output width."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class Technique(abc.ABC):
    """One way to make a matrix smaller. A technique is one file and one frozen dataclass, whose fields are its options.

    What it makes of a matrix is its own: any pytree of arrays, whose leaves hold all that is kept. Its methods run
    under `jax.jit`.
    """

    needs_statistics: ClassVar[bool] = False
    """Whether `compress` wants to know what activations the matrix meets, such as a Hessian."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """In few words what it does, for a table: "int4, groups of 64"."""

    @abc.abstractmethod
    def compress(self, weight: Float[Array, "*lead D F"], statistics: Any = None) -> Any:
        """The matrices in fewer bytes.

        Args:
            weight: matrices that rows of length D are multiplied with.
            statistics: of the matrix's path; None where the technique needs none.

        Raises:
            ValueError: the technique cannot do this to such an array, from its shape and dtype alone: so it is asked
                of shapes first, before anything is computed.
        """

    @abc.abstractmethod
    def expand(self, compressed: Any) -> Float[Array, "*lead D F"]:
        """The numbers that a compressed matrix stands for."""
