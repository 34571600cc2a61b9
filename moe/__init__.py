"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .dispatchers import CapacityDispatcher, DenseDispatcher, Dispatcher, DroplessDispatcher
from .experts import GELU, Experts, SwiGLU
from .feed_forward import FeedForward, LayerPattern, Tap, no_tap
from .layer import MoE, MoELayer
from .losses import BalanceLoss, RouterLoss, ZLoss
from .routers import TopK
from .routing import Router, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .telemetry import MoEStats

__all__ = [
    "GELU",
    "BalanceLoss",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "Experts",
    "FeedForward",
    "LayerPattern",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Router",
    "RouterLoss",
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
]
