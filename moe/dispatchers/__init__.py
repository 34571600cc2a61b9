"""Dispatchers: one way to carry tokens to experts and back, one file."""

from .dense import DenseDispatcher
from .dispatcher import Dispatcher, Plan

__all__ = ["DenseDispatcher", "Dispatcher", "Plan"]
