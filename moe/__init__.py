"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .balancing import Balancing, BalancingModule, LossFree
from .dispatchers import (
    BatchPriority,
    CapacityDispatcher,
    DenseDispatcher,
    Dispatcher,
    DroplessDispatcher,
    FirstChoicesFirst,
    Order,
    Plan,
    TokenOrder,
)
from .experts import GELU, Experts, ExpertsModule, SwiGLU
from .feed_forward import FeedForward, FeedForwardModule, LayerPattern, Tap, no_tap
from .layer import MoE, MoELayer
from .losses import BalanceLoss, RouterLoss, ZLoss
from .routers import BASE, ExpertChoice, Hash, HashTable, RandomTable, ReLURouting, Sinkhorn, TopK, balanced_table
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .soft import SoftMoE
from .telemetry import MoEStats

__all__ = [
    "BASE",
    "GELU",
    "NO_CONTEXT",
    "BalanceLoss",
    "Balancing",
    "BalancingModule",
    "BatchPriority",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "ExpertChoice",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "FirstChoicesFirst",
    "Hash",
    "HashTable",
    "LayerPattern",
    "LossFree",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Order",
    "Plan",
    "RandomTable",
    "ReLURouting",
    "Router",
    "RouterLoss",
    "RouterModule",
    "RouterState",
    "Routing",
    "RoutingContext",
    "Scores",
    "Sigmoid",
    "Sinkhorn",
    "SoftMoE",
    "Softmax",
    "SwiGLU",
    "Tap",
    "TokenOrder",
    "TopK",
    "ZLoss",
    "balanced_table",
    "no_tap",
]
