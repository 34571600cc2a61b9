"""Exits: places after which a model can already answer, and the heads that answer there.

    Decoder(layers=8, exits=Exits(after=(2, 4, 6)))

The last layer's own head is always the last exit. Letters: D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

from .exit_losses import DepthWeighted, ExitLoss


class ExitHead:
    """What makes logits at an exit."""

    own_norm: ClassVar[bool]
    """Whether each exit has a norm of its own; else the model's last one serves all."""
    own_kernel: ClassVar[bool]
    """Whether each exit has a matrix [D, V] of its own; else the model's head serves all."""


@dataclass(frozen=True, kw_only=True)
class SharedHead(ExitHead):
    """The model's own norm and head, as in LayerSkip: Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710."""

    own_norm = False
    own_kernel = False


@dataclass(frozen=True, kw_only=True)
class OwnNorm(ExitHead):
    """A norm of each exit before the model's head: D parameters that let one head read all depths."""

    own_norm = True
    own_kernel = False


@dataclass(frozen=True, kw_only=True)
class OwnHead(ExitHead):
    """A norm and a matrix of each exit, as in BranchyNet: Teerapittayanon et al. 2016,
    https://arxiv.org/abs/1709.01686."""

    own_norm = True
    own_kernel = True


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Where a model can end early, with what head, and how the exits are trained."""

    after: tuple[int, ...]
    """How many layers run before each exit, ascending; the last layer's exit is not named."""
    head: ExitHead = OwnNorm()
    """Makes the logits of the exits before the last."""
    loss: ExitLoss = DepthWeighted()
    """What each exit counts in training."""

    def __post_init__(self):
        if not self.after:
            raise ValueError("Exits.after is (); name one exit at least, or leave the model without")
        if self.after[0] < 1 or any(a >= b for a, b in zip(self.after, self.after[1:], strict=False)):
            raise ValueError(f"Exits.after is {self.after}; it must ascend from 1 or more, each once")

    def depths(self, layers: int) -> tuple[int, ...]:
        """Layers before each exit of a model of so many layers, the last among them.

        Raises:
            ValueError: an exit lies behind the last layer, or there.
        """
        if self.after[-1] >= layers:
            raise ValueError(
                f"Exits.after is {self.after}; with {layers} layers exits may follow layers 1 to {layers - 1}, and the "
                "last layer has one anyway"
            )
        return (*self.after, layers)
