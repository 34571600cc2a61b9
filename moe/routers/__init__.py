"""Routers: one technique, one file."""

from .base import BASE, BASERouter
from .equal_weights import EqualWeights, EqualWeightsRouter
from .expert_choice import ExpertChoice, ExpertChoiceRouter
from .hash import Hash, HashRouter, HashTable, RandomTable, balanced_table
from .null_experts import NullExperts, NullExpertsRouter
from .random import Random, RandomRouter
from .relu import ReLURouter, ReLURouting
from .sinkhorn import Sinkhorn, SinkhornRouter
from .top_k import TopK, TopKRouter
from .top_p import TopP, TopPRouter

__all__ = [
    "BASE",
    "BASERouter",
    "EqualWeights",
    "EqualWeightsRouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "Hash",
    "HashRouter",
    "HashTable",
    "NullExperts",
    "NullExpertsRouter",
    "Random",
    "RandomRouter",
    "RandomTable",
    "ReLURouter",
    "ReLURouting",
    "Sinkhorn",
    "SinkhornRouter",
    "TopK",
    "TopKRouter",
    "TopP",
    "TopPRouter",
    "balanced_table",
]
