"""Routers: one technique, one file."""

from .top_k import TopK, TopKRouter

__all__ = ["TopK", "TopKRouter"]
