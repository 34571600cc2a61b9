"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .dispatchers import CapacityDispatcher, DenseDispatcher, Dispatcher, DroplessDispatcher, Plan
from .experts import GELU, Experts, ExpertsModule, SwiGLU
from .feed_forward import FeedForward, FeedForwardModule, LayerPattern, Tap, no_tap
from .layer import MoE, MoELayer
from .losses import (
    BalanceLoss,
    EntropyLoss,
    Gates,
    GlobalBatch,
    ImportanceLoss,
    LoadLoss,
    PerSequence,
    Probabilities,
    RouterLoss,
    Scope,
    ZLoss,
)
from .routers import TopK
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .telemetry import MoEStats

__all__ = [
    "GELU",
    "NO_CONTEXT",
    "BalanceLoss",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "EntropyLoss",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "Gates",
    "GlobalBatch",
    "ImportanceLoss",
    "LayerPattern",
    "LoadLoss",
    "MoE",
    "MoELayer",
    "MoEStats",
    "PerSequence",
    "Plan",
    "Probabilities",
    "Router",
    "RouterLoss",
    "RouterModule",
    "RouterState",
    "Routing",
    "RoutingContext",
    "Scope",
    "Scores",
    "Sigmoid",
    "Softmax",
    "SwiGLU",
    "Tap",
    "TopK",
    "ZLoss",
    "no_tap",
]
