"""Dispatchers: one way to carry tokens to experts and back, one file."""

from .capacity import CapacityDispatcher
from .dense import DenseDispatcher
from .dispatcher import Carried, Dispatcher, Plan
from .dropless import DroplessDispatcher
from .exchanges import AllGather, AllToAll, Exchange, RaggedAllToAll
from .expert_parallel import ExpertParallel
from .fused import FusedDispatcher
from .order import BatchPriority, FirstChoicesFirst, Order, TokenOrder

__all__ = [
    "AllGather",
    "AllToAll",
    "BatchPriority",
    "CapacityDispatcher",
    "Carried",
    "DenseDispatcher",
    "Dispatcher",
    "DroplessDispatcher",
    "Exchange",
    "ExpertParallel",
    "FirstChoicesFirst",
    "FusedDispatcher",
    "Order",
    "Plan",
    "RaggedAllToAll",
    "TokenOrder",
]
