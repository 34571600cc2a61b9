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
from .fine_grained import fine_grained
from .group_limit import GroupLimit
from .latent import Latent
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
from .noise import Gumbel, Jitter, LearnedNoise, Noise, NoiseModule, NoisyLogits
from .quantized_experts import QuantizedWeight, quantize_experts
from .residual import Residual
from .routers import (
    BASE,
    EqualWeights,
    ExpertChoice,
    Hash,
    HashTable,
    NullExperts,
    Random,
    RandomTable,
    ReLURouting,
    Sinkhorn,
    TopK,
    TopP,
    balanced_table,
)
from .routing import NO_CONTEXT, Router, RouterModule, RouterState, Routing, RoutingContext
from .scores import Scores, Sigmoid, Softmax
from .shared import GatedShared
from .soft import SoftMoE
from .telemetry import MoEStats
from .upcycling import Copy, CopyWithNoise, GranularSplit, MoEfication, Upcycling

__all__ = [
    "BASE",
    "GELU",
    "NO_CONTEXT",
    "BalanceLoss",
    "Balancing",
    "BalancingModule",
    "BatchPriority",
    "CapacityDispatcher",
    "Copy",
    "CopyWithNoise",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "EntropyLoss",
    "EqualWeights",
    "ExpertChoice",
    "Experts",
    "ExpertsModule",
    "FeedForward",
    "FeedForwardModule",
    "FirstChoicesFirst",
    "GatedShared",
    "Gates",
    "GlobalBatch",
    "GranularSplit",
    "GroupLimit",
    "Gumbel",
    "Hash",
    "HashTable",
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
    "MoEfication",
    "Noise",
    "NoiseModule",
    "NoisyLogits",
    "NullExperts",
    "Order",
    "PerSequence",
    "Plan",
    "Probabilities",
    "QuantizedWeight",
    "Random",
    "RandomTable",
    "ReLURouting",
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
    "Sinkhorn",
    "SoftMoE",
    "Softmax",
    "SwiGLU",
    "Tap",
    "TokenOrder",
    "TopK",
    "TopP",
    "Upcycling",
    "ZLoss",
    "balanced_table",
    "fine_grained",
    "no_tap",
    "quantize_experts",
]
