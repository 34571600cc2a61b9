"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .dispatchers import CapacityDispatcher, DenseDispatcher, Dispatcher, DroplessDispatcher, Plan
from .experts import GELU, Experts, ExpertsModule, SwiGLU
from .feed_forward import FeedForward, FeedForwardModule, LayerPattern, Tap, no_tap
from .layer import MoE, MoELayer
from .losses import BalanceLoss, RouterLoss, ZLoss
from .routers import EqualWeights, TopK
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .telemetry import MoEStats
from .upcycling import Copy, CopyWithNoise, GranularSplit, MoEfication, Upcycling

__all__ = [
    "GELU",
    "NO_CONTEXT",
    "BalanceLoss",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "LayerPattern",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Plan",
    "Router",
    "RouterLoss",
    "RouterModule",
    "RouterState",
    "Routing",
    "RoutingContext",
    "Scores",
    "Sigmoid",
    "Softmax",
    "SwiGLU",
    "Tap",
    "TopK",
    "ZLoss",
    "no_tap",
    "EqualWeights",
    "Copy",
    "CopyWithNoise",
    "GranularSplit",
    "MoEfication",
    "Upcycling",
]
