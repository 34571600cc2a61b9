"""Mixture of experts: routers, dispatchers, experts, losses, telemetry and the layer that joins them."""

from .balancing import Balancing, BalancingModule, LossFree
from .dispatchers import CapacityDispatcher, DenseDispatcher, Dispatcher, DroplessDispatcher, Plan
from .experts import GELU, Experts, ExpertsModule, SwiGLU
from .feed_forward import FeedForward, FeedForwardModule, LayerPattern, Tap, no_tap
from .fine_grained import fine_grained
from .group_limit import GroupLimit
from .latent import Latent
from .layer import MoE, MoELayer
from .losses import BalanceLoss, EntropyLoss, Gates, GlobalBatch, ImportanceLoss, LoadLoss, PerSequence, Probabilities, RouterLoss, Scope, ZLoss
from .noise import Gumbel, Jitter, LearnedNoise, Noise, NoiseModule, NoisyLogits
from .quantized_experts import QuantizedWeight, quantize_experts
from .residual import Residual
from .routers import EntropyLoss, NullBalanceLoss, NullExperts, Random, TopK, TopP
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .shared import GatedShared
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
    "EntropyLoss",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "GatedShared",
    "Gates",
    "GlobalBatch",
    "GroupLimit",
    "Gumbel",
    "ImportanceLoss",
    "Jitter",
    "Latent",
    "LayerPattern",
    "LearnedNoise",
    "LoadLoss",
    "LossFree",
    "MoE",
    "MoELayer",
    "MoEStats",
    "Noise",
    "NoiseModule",
    "NoisyLogits",
    "NullBalanceLoss",
    "NullExperts",
    "PerSequence",
    "Plan",
    "Probabilities",
    "QuantizedWeight",
    "Random",
    "Residual",
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
    "TopP",
    "ZLoss",
    "fine_grained",
    "no_tap",
    "quantize_experts",
]
