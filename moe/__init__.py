"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .balancing import Balancing, BalancingModule, LossFree
from .dispatchers import CapacityDispatcher, DenseDispatcher, Dispatcher, DroplessDispatcher, Plan
from .experts import GELU, Experts, ExpertsModule, SwiGLU
from .feed_forward import FeedForward, FeedForwardModule, LayerPattern, Tap, no_tap
from .group_limit import GroupLimit
from .layer import MoE, MoELayer
from .losses import BalanceLoss, RouterLoss, ZLoss
from .noise import Gumbel, Jitter, LearnedNoise, Noise, NoiseModule, NoisyLogits
from .routers import TopK
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .telemetry import MoEStats

__all__ = [
    "GELU",
    "NO_CONTEXT",
    "BalanceLoss",
    "Balancing",
    "BalancingModule",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "GroupLimit",
    "Gumbel",
    "Jitter",
    "LayerPattern",
    "LearnedNoise",
    "LossFree",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Noise",
    "NoiseModule",
    "NoisyLogits",
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
]
