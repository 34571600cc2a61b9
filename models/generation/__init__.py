"""Generation: many requests share a model's rows, each as if it were alone."""

from .early_exit import Depths, EarlyExitEngine
from .engine import Drawn, Engine, Usage
from .filters import Filter, MinPTokens, RepetitionPenalty, Temperature, TopKTokens, TopPTokens
from .request import Finish, Request
from .samplers import Categorical, Greedy, Sampler
from .self_speculation import Acceptance, SelfSpeculationEngine
from .text import AnyEngine, Piece, TextRequest, generate_text

__all__ = [
    "Acceptance",
    "AnyEngine",
    "Categorical",
    "Depths",
    "Drawn",
    "EarlyExitEngine",
    "Engine",
    "Filter",
    "Finish",
    "Greedy",
    "MinPTokens",
    "Piece",
    "RepetitionPenalty",
    "Request",
    "Sampler",
    "SelfSpeculationEngine",
    "Temperature",
    "TextRequest",
    "TopKTokens",
    "TopPTokens",
    "Usage",
    "generate_text",
]
