"""Routers: one technique, one file."""

from .base import BASE, BASERouter
from .expert_choice import ExpertChoice, ExpertChoiceRouter
from .hash import Hash, HashRouter, HashTable, RandomTable, balanced_table
from .relu import ReLURouter, ReLURouting
from .sinkhorn import Sinkhorn, SinkhornRouter
from .top_k import TopK, TopKRouter

__all__ = [
    "BASE",
    "BASERouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "Hash",
    "HashRouter",
    "HashTable",
    "RandomTable",
    "ReLURouter",
    "ReLURouting",
    "Sinkhorn",
    "SinkhornRouter",
    "TopK",
    "TopKRouter",
    "balanced_table",
]
