"""Smaller weights: pure functions on `{path: array}`, rules of what is done where, a coverage report of all."""

from .coverage import Coverage, CoverageReport
from .round_to_nearest import RoundToNearest
from .rules import Rule, choose_techniques, compress, compress_one
from .technique import Technique

__all__ = [
    "Coverage",
    "CoverageReport",
    "RoundToNearest",
    "Rule",
    "Technique",
    "choose_techniques",
    "compress",
    "compress_one",
]
