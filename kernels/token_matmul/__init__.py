"""Grouped matmuls that carry tokens to their experts' rows, and back; `api.py` has the functions."""

from .api import gather_matmul, matmul_combine

__all__ = ["gather_matmul", "matmul_combine"]
