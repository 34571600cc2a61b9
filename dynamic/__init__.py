"""Dynamic inference: exits, their training, calibration, speculation and cascades."""

from .exit_losses import DepthWeighted, ExitLoss, LayerSkipLoss, SelfDistilled, divergence
from .exits import ExitHead, Exits, OwnHead, OwnNorm, SharedHead
from .layer_dropout import LayerDropout

__all__ = [
    "DepthWeighted",
    "ExitHead",
    "ExitLoss",
    "Exits",
    "LayerDropout",
    "LayerSkipLoss",
    "OwnHead",
    "OwnNorm",
    "SelfDistilled",
    "SharedHead",
    "divergence",
]
