"""Reproducing a paper's claim at a small scale: what a file in experiments/papers/ is made of."""

from .claims import Claim, Faster, Lower
from .measures import BITS_PER_BYTE, DROPPED, MAX_VIOLATION, Measure
from .paper import Paper

__all__ = ["BITS_PER_BYTE", "DROPPED", "MAX_VIOLATION", "Claim", "Faster", "Lower", "Measure", "Paper"]
