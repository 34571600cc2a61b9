"""Dynamic inference: exits, their training and calibration, decoding policies, cascades; of no concrete model."""

from .buckets import Bucketed, Buckets, run_in_buckets
from .budget import BudgetedThresholds, budgeted_thresholds
from .calibration import learn_then_test, units_needed
from .cascade import Cascade, CascadeModel, CascadeRun, Outcomes, chosen_models, of_chosen, thresholds_by_level
from .cascade_curve import Curve, cascade_curve
from .classification import ExitRun, StageOutput, run_with_exits
from .confidence import (
    Confidence,
    HiddenSimilarity,
    NegativeEntropy,
    Patience,
    Top2Gap,
    merge_confidence,
    split_confidence,
)
from .deferral import Agreement, Answers, Deferral, Entropy, MaxProbability, TokenQuantile
from .depth_queue import DepthQueue
from .early_exit import (
    BatchPolicy,
    DeferLayers,
    EarlyExit,
    PropagateState,
    RecomputeLayers,
    RowByRow,
    SkippedLayers,
    WholeBatch,
)
from .ensemble import Ensemble
from .exit_losses import DepthWeighted, ExitLoss, LayerSkipLoss, SelfDistilled, divergence
from .exits import ExitHead, Exits, OwnHead, OwnNorm, SharedHead
from .fingerprint import fingerprint
from .guarantee import Guarantee, Policy
from .layer_dropout import LayerDropout
from .learned_confidence import LearnedClassifier
from .learned_deferral import LearnedDeferral, fit_deferral
from .p_values import Betting, Hoeffding, HoeffdingBentkus, PValue
from .risks import disagreement, loss_of_quality, wrong_only_early
from .speculation import Accepted, accept_greedy, accept_sampled, predicted_speedup, tokens_per_round
from .temperature import TemperatureFit, calibration_error, fit_temperature, fit_temperatures
from .thresholds import Constant, Decaying, NeverExit, PerExit, Thresholds
from .upper_bounds import upper_bounds

__all__ = [
    "Accepted",
    "Agreement",
    "Answers",
    "BatchPolicy",
    "Betting",
    "Bucketed",
    "Buckets",
    "BudgetedThresholds",
    "Cascade",
    "CascadeModel",
    "CascadeRun",
    "Confidence",
    "Constant",
    "Curve",
    "Decaying",
    "DeferLayers",
    "Deferral",
    "DepthQueue",
    "DepthWeighted",
    "EarlyExit",
    "Ensemble",
    "Entropy",
    "ExitHead",
    "ExitLoss",
    "ExitRun",
    "Exits",
    "Guarantee",
    "HiddenSimilarity",
    "Hoeffding",
    "HoeffdingBentkus",
    "LayerDropout",
    "LayerSkipLoss",
    "LearnedClassifier",
    "LearnedDeferral",
    "MaxProbability",
    "NegativeEntropy",
    "NeverExit",
    "Outcomes",
    "OwnHead",
    "OwnNorm",
    "PValue",
    "Patience",
    "PerExit",
    "Policy",
    "PropagateState",
    "RecomputeLayers",
    "RowByRow",
    "SelfDistilled",
    "SharedHead",
    "SkippedLayers",
    "StageOutput",
    "TemperatureFit",
    "Thresholds",
    "TokenQuantile",
    "Top2Gap",
    "WholeBatch",
    "accept_greedy",
    "accept_sampled",
    "budgeted_thresholds",
    "calibration_error",
    "cascade_curve",
    "chosen_models",
    "disagreement",
    "divergence",
    "fingerprint",
    "fit_deferral",
    "fit_temperature",
    "fit_temperatures",
    "learn_then_test",
    "loss_of_quality",
    "merge_confidence",
    "of_chosen",
    "predicted_speedup",
    "run_in_buckets",
    "run_with_exits",
    "split_confidence",
    "thresholds_by_level",
    "tokens_per_round",
    "units_needed",
    "upper_bounds",
    "wrong_only_early",
]
