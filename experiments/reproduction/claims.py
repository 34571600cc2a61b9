"""What a paper claims of two arms, and the rule that judges it: written in the paper's file before the numbers.

Each claim says that something lies below a bound. It is reproduced where the whole 95% interval lies below the bound,
not reproduced where the whole interval lies at or above it, and inconclusive otherwise. Each interval stands alone: no
correction is made for a paper having several claims. A claim of your own subclasses `Claim`.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .comparing import Estimate, median_ratio, paired_difference
from .measures import Measure

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


class Numbers(NamedTuple):
    """All that was measured of a paper's arms."""

    measures: Mapping[str, Mapping[str, Mapping[int, float | None]]]
    """By measure, arm and seed; None where the arm has nothing to measure, as a dense model's routers."""
    step_seconds: Mapping[str, Sequence[float]]
    """Seconds of a training step by arm, one for each round in which the arms took turns; empty where not timed."""


class Finding(NamedTuple):
    """What became of a claim."""

    claim: str
    published: str
    quantity: str
    """What was compared, in words: "held-out bits per byte, a - b"."""
    measure: str
    """The measure's name, or `STEP_TIME`."""
    estimate: Estimate
    bound: float
    verdict: Verdict


STEP_TIME = "step time"


@dataclass(frozen=True, kw_only=True)
class Claim(abc.ABC):
    """One sentence of a paper, as a comparison of two arms."""

    says: str
    """The claim in a sentence."""
    published: str
    """The paper's own number, and where it stands."""
    arm: str
    """The arm that the claim is about."""
    than: str
    """The arm that it is compared with."""

    @abc.abstractmethod
    def judge(self, numbers: Numbers) -> Finding:
        """Apply the rule."""


@dataclass(frozen=True, kw_only=True)
class Lower(Claim):
    """The mean difference of a measure, `arm` minus `than` over runs paired by seed, lies below `bound`."""

    measure: Measure
    """What is compared."""
    bound: float = 0.0
    """0: lower; above 0: at most so much higher; below 0: lower by more than that."""

    def judge(self, numbers: Numbers) -> Finding:
        first, second = (_measured(numbers, self.measure.name, arm) for arm in (self.arm, self.than))
        if sorted(first) != sorted(second):
            raise ValueError(f"{self.arm} has the seeds {sorted(first)} and {self.than} {sorted(second)}: no pairs")
        estimate = paired_difference([first[seed] for seed in first], [second[seed] for seed in first])
        quantity = f"{self.measure.name}, {self.arm} - {self.than}"
        verdict = verdict_of(estimate, self.bound)
        return Finding(self.says, self.published, quantity, self.measure.name, estimate, self.bound, verdict)


@dataclass(frozen=True, kw_only=True)
class Faster(Claim):
    """The median ratio of step times, `arm` over `than` in rounds in which they took turns, lies below `bound`."""

    bound: float = 1.0
    """1: faster at all."""

    def judge(self, numbers: Numbers) -> Finding:
        estimate = median_ratio(numbers.step_seconds[self.arm], numbers.step_seconds[self.than])
        quantity = f"{STEP_TIME}, {self.arm} / {self.than}"
        verdict = verdict_of(estimate, self.bound)
        return Finding(self.says, self.published, quantity, STEP_TIME, estimate, self.bound, verdict)


def verdict_of(estimate: Estimate, bound: float) -> Verdict:
    """Where the interval lies beside the bound."""
    if estimate.high < bound:
        return "reproduced"
    return "not reproduced" if estimate.low >= bound else "inconclusive"


def verdict_of_all(findings: Sequence[Finding]) -> Verdict:
    """Of a paper: reproduced where every claim is, not reproduced where one is not, inconclusive otherwise."""
    verdicts = {finding.verdict for finding in findings}
    if verdicts == {"reproduced"}:
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts else "inconclusive"


def _measured(numbers: Numbers, measure: str, arm: str) -> dict[int, float]:
    values = {seed: value for seed, value in numbers.measures[measure][arm].items() if value is not None}
    if not values:
        raise ValueError(f"{arm} has no {measure}; a claim compares arms that have")
    return values
