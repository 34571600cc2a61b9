"""Dynamic inference: algorithms over the `Layered` and `Decoder` protocols, never over a concrete model."""

from .calibration import learn_then_test, units_needed
from .confidence import Confidence, HiddenSimilarity, NegativeEntropy, Patience, Top2Gap
from .guarantee import Guarantee, Policy
from .learned_confidence import LearnedClassifier
from .p_values import Betting, Hoeffding, HoeffdingBentkus, PValue
from .thresholds import Constant, Decaying, NeverExit, PerExit, Thresholds

__all__ = [
    "Betting",
    "Confidence",
    "Constant",
    "Decaying",
    "Guarantee",
    "HiddenSimilarity",
    "Hoeffding",
    "HoeffdingBentkus",
    "LearnedClassifier",
    "NegativeEntropy",
    "NeverExit",
    "PValue",
    "Patience",
    "PerExit",
    "Policy",
    "Thresholds",
    "Top2Gap",
    "learn_then_test",
    "units_needed",
]
