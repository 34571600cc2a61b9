"""Routers: one technique, one file."""

from .equal_weights import EqualWeights, EqualWeightsRouter
from .top_k import TopK, TopKRouter

__all__ = ["EqualWeights", "EqualWeightsRouter", "TopK", "TopKRouter"]
