"""Kernels: arrays in, arrays out; one folder per op, one file per implementation. Imports jax and numpy alone."""

from .grouped_matmul import grouped_matmul
from .ragged_all_to_all import ragged_all_to_all
from .token_matmul import gather_matmul, matmul_combine
from .token_permute import Permutation, fixed_groups, permute, sort_by_expert, unpermute

__all__ = [
    "Permutation",
    "fixed_groups",
    "gather_matmul",
    "grouped_matmul",
    "matmul_combine",
    "permute",
    "ragged_all_to_all",
    "sort_by_expert",
    "unpermute",
]
