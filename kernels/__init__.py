"""Kernels: arrays in, arrays out; one folder per op, one file per implementation. Imports jax and numpy alone."""

from .grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
