"""From the arrays of a dense feed-forward network to those of a mixture of experts: one technique, one file."""

from .copy import Copy
from .copy_with_noise import CopyWithNoise
from .granular_split import GranularSplit
from .moefication import MoEfication
from .technique import DenseWeights, ExpertWeights, Upcycling

__all__ = ["Copy", "CopyWithNoise", "DenseWeights", "ExpertWeights", "GranularSplit", "MoEfication", "Upcycling"]
