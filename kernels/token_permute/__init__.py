"""Tokens to rows sorted by expert, and back; `api.py` has the functions."""

from .api import permute, sort_by_expert, unpermute
from .permutation import Permutation, fixed_groups

__all__ = ["Permutation", "fixed_groups", "permute", "sort_by_expert", "unpermute"]
