"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .dispatchers import DenseDispatcher, Dispatcher
from .experts import Experts, SwiGLU
from .feed_forward import FeedForward, LayerPattern, Tap, no_tap
from .layer import MoE, MoELayer
from .losses import BalanceLoss, RouterLoss
from .routers import TopK
from .routing import Router, Routing, RoutingContext
from .telemetry import MoEStats

__all__ = [
    "BalanceLoss",
    "DenseDispatcher",
    "Dispatcher",
    "Experts",
    "FeedForward",
    "LayerPattern",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Router",
    "RouterLoss",
    "Routing",
    "RoutingContext",
    "SwiGLU",
    "Tap",
    "TopK",
    "no_tap",
]
