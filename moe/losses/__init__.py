"""Auxiliary losses of routers: one technique, one file."""

from .balance import BalanceLoss
from .entropy import EntropyLoss, entropy
from .importance import Gates, ImportanceLoss, Probabilities
from .load import LoadLoss
from .loss import RouterLoss, assignment_share, check_coefficient, importance, token_mean
from .scope import GlobalBatch, PerSequence, Scope
from .z import ZLoss

__all__ = [
    "BalanceLoss",
    "EntropyLoss",
    "Gates",
    "GlobalBatch",
    "ImportanceLoss",
    "LoadLoss",
    "PerSequence",
    "Probabilities",
    "RouterLoss",
    "Scope",
    "ZLoss",
    "assignment_share",
    "check_coefficient",
    "entropy",
    "importance",
    "token_mean",
]
