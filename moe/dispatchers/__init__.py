"""Dispatchers: one way to carry tokens to experts and back, one file."""

from .capacity import CapacityDispatcher
from .dense import DenseDispatcher
from .dispatcher import Dispatcher, Plan
from .dropless import DroplessDispatcher
from .order import BatchPriority, FirstChoicesFirst, Order, TokenOrder

__all__ = [
    "BatchPriority",
    "CapacityDispatcher",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "FirstChoicesFirst",
    "Order",
    "Plan",
    "TokenOrder",
]
