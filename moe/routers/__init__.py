"""Routers: one technique, one file."""

from .null_experts import NullBalanceLoss, NullExperts, NullExpertsRouter
from .random import Random, RandomRouter
from .top_k import TopK, TopKRouter
from .top_p import EntropyLoss, TopP, TopPRouter

__all__ = [
    "EntropyLoss",
    "NullBalanceLoss",
    "NullExperts",
    "NullExpertsRouter",
    "Random",
    "RandomRouter",
    "TopK",
    "TopKRouter",
    "TopP",
    "TopPRouter",
]
