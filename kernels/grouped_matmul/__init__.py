"""The product of sorted rows with their group's matrix; `api.py` has the function."""

from .api import grouped_matmul

__all__ = ["grouped_matmul"]
