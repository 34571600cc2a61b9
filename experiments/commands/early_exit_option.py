"""Early exit as options: `--early-exit 0.8`, or `--early-exit calibrated` by the guarantee beside the run."""

from typing import Literal

from ...dynamic import Constant, DeferLayers, EarlyExit, Guarantee, NeverExit, PropagateState, RecomputeLayers
from ...models.generation import Sampler
from ..exit_sweep import policy_record
from ..places import Place
from ..training.restore import Trained

GUARANTEE = "early_exit.json"
"""Beside a run: what `dynamoe evaluate --sweep thresholds` calibrated."""
CALIBRATED = "calibrated"
Skipped = Literal["propagate", "defer", "recompute"]
SKIPPED = {"propagate": PropagateState(), "defer": DeferLayers(), "recompute": RecomputeLayers()}


def policy_of(text: str, skipped: Skipped, trained: Trained, sampler: Sampler) -> EarlyExit:
    """The policy that the options describe.

    Args:
        text: a threshold, or "calibrated".
        skipped: what becomes of the layers that a token skips.
        trained: the model, with the guarantee beside it.
        sampler: how tokens are chosen.

    Raises:
        ValueError: it is neither, there is no guarantee, or it was calibrated for other answers.
    """
    policy = EarlyExit(thresholds=NeverExit(), skipped=SKIPPED[skipped])
    if text != CALIBRATED:
        return EarlyExit(thresholds=Constant(threshold=threshold_of(text)), skipped=policy.skipped)
    thresholds = read_guarantee(trained.run).thresholds_for(policy_record(trained.model, policy, sampler))
    return EarlyExit(thresholds=thresholds, skipped=policy.skipped)


def read_guarantee(run: Place | None) -> Guarantee:
    """What a sweep left beside a run.

    Raises:
        ValueError: there is none, or it was changed.
    """
    file = None if run is None else run / GUARANTEE
    if file is None or not file.is_file():
        raise ValueError(
            f"early_exit is {CALIBRATED!r}, and there is no {file or GUARANTEE}: dynamoe evaluate --sweep thresholds "
            "--run-dir RUN calibrates it"
        )
    return Guarantee.from_json(file.read_text(encoding="utf-8"))


def threshold_of(text: str) -> float:
    """The number that was given for a threshold.

    Raises:
        ValueError: it is none from 0 to 1.
    """
    try:
        threshold = float(text)
    except ValueError:
        threshold = None
    if threshold is None or not 0 <= threshold <= 1:
        raise ValueError(f"early_exit is {text!r}; it must be a threshold from 0 to 1, or {CALIBRATED!r}")
    return threshold
