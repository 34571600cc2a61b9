"""Dispatchers: one way to carry tokens to experts and back, one file."""

from .capacity import CapacityDispatcher
from .dense import DenseDispatcher
from .dispatcher import Dispatcher, Plan
from .dropless import DroplessDispatcher

__all__ = ["CapacityDispatcher", "DenseDispatcher", "Dispatcher", "DroplessDispatcher", "Plan"]
