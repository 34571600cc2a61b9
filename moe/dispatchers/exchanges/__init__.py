"""How tokens reach experts on other devices: one way, one file."""

from .all_gather import AllGather
from .all_to_all import AllToAll
from .exchange import Exchange, ExpertAxes
from .ragged_all_to_all import RaggedAllToAll

__all__ = ["AllGather", "AllToAll", "Exchange", "ExpertAxes", "RaggedAllToAll"]
