"""Rows from each device of a mesh axis to each other, as many as there are."""

from .api import ragged_all_to_all
from .slices import Slices

__all__ = ["Slices", "ragged_all_to_all"]
