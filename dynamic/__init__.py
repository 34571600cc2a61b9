"""Dynamic inference: exits, their training, calibration, speculation and cascades."""

from .confidence import Confidence, Top2Gap
from .depth_queue import DepthQueue
from .early_exit import (
    BatchPolicy,
    DeferLayers,
    EarlyExit,
    PropagateState,
    RecomputeLayers,
    RowByRow,
    SkippedLayers,
    WholeBatch,
)
from .exit_losses import DepthWeighted, ExitLoss, LayerSkipLoss, SelfDistilled, divergence
from .exits import ExitHead, Exits, OwnHead, OwnNorm, SharedHead
from .layer_dropout import LayerDropout
from .thresholds import Constant, Decaying, PerExit, Threshold

__all__ = [
    "BatchPolicy",
    "Confidence",
    "Constant",
    "Decaying",
    "DeferLayers",
    "DepthQueue",
    "DepthWeighted",
    "EarlyExit",
    "ExitHead",
    "ExitLoss",
    "Exits",
    "LayerDropout",
    "LayerSkipLoss",
    "OwnHead",
    "OwnNorm",
    "PerExit",
    "PropagateState",
    "RecomputeLayers",
    "RowByRow",
    "SelfDistilled",
    "SharedHead",
    "SkippedLayers",
    "Threshold",
    "Top2Gap",
    "WholeBatch",
    "divergence",
]
