"""The rule gives all three verdicts."""

import pytest

from dynamoe.experiments.reproduction.claims import Faster, Lower, Numbers, verdict_of, verdict_of_all
from dynamoe.experiments.reproduction.comparing import Estimate
from dynamoe.experiments.reproduction.measures import BITS_PER_BYTE, DROPPED

CLAIM = Lower(says="New beats old.", published="-0.1", measure=BITS_PER_BYTE, arm="new", than="old")


def numbers(*differences: float) -> Numbers:
    old = {seed: 2.0 + 0.3 * seed for seed in range(len(differences))}
    new = {seed: old[seed] + difference for seed, difference in enumerate(differences)}
    return Numbers({BITS_PER_BYTE.name: {"old": old, "new": new}}, {})


@pytest.mark.parametrize(
    ("differences", "bound", "verdict"),
    [
        ((-0.11, -0.10, -0.09), 0.0, "reproduced"),  # mean -0.1, half the interval 0.0248
        ((0.11, 0.10, 0.09), 0.0, "not reproduced"),
        ((-0.11, -0.10, 0.09), 0.0, "inconclusive"),
        ((-0.11, -0.10, -0.09), -0.09, "inconclusive"),
        ((-0.11, -0.10, -0.09), -0.2, "not reproduced"),
        ((0.11, 0.10, 0.09), 0.2, "reproduced"),
    ],
)
def test_a_difference_is_judged_by_where_its_interval_lies(
    differences: tuple[float, ...], bound: float, verdict: str
) -> None:
    claim = Lower(says="", published="", measure=BITS_PER_BYTE, arm="new", than="old", bound=bound)
    assert claim.judge(numbers(*differences)).verdict == verdict


def test_an_interval_that_begins_at_the_bound_is_not_below_it() -> None:
    assert verdict_of(Estimate(0.1, 0.0, 0.2, 3, None), 0.0) == "not reproduced"
    assert verdict_of(Estimate(-0.1, -0.2, 0.0, 3, None), 0.0) == "inconclusive"


def test_runs_are_paired_by_seed_whatever_their_order() -> None:
    made_up = numbers(-0.11, -0.10, -0.09)
    shuffled = {arm: dict(reversed(values.items())) for arm, values in made_up.measures[BITS_PER_BYTE.name].items()}
    shuffled["old"] = made_up.measures[BITS_PER_BYTE.name]["old"]
    assert CLAIM.judge(Numbers({BITS_PER_BYTE.name: shuffled}, {})) == CLAIM.judge(made_up)


def test_runs_of_different_seeds_are_no_pairs() -> None:
    values = {"new": {0: 1.0, 1: 1.1, 2: 1.2}, "old": {0: 1.0, 1: 1.1, 3: 1.2}}
    with pytest.raises(ValueError, match=r"new has the seeds \[0, 1, 2\] and old \[0, 1, 3\]"):
        CLAIM.judge(Numbers({BITS_PER_BYTE.name: values}, {}))


@pytest.mark.parametrize(("ratio", "verdict"), [(0.8, "reproduced"), (1.2, "not reproduced"), (1.0, "inconclusive")])
def test_a_step_time_is_judged_by_paired_ratios(ratio: float, verdict: str) -> None:
    drift = [1.0, 1.5, 2.0, 0.5, 1.1, 3.0, 1.2]  # the machine's, which both arms share
    new = [second * ratio * (1.1 if i % 2 else 0.9) for i, second in enumerate(drift)]
    claim = Faster(says="", published="", arm="new", than="old")
    finding = claim.judge(Numbers({}, {"new": new, "old": drift}))
    assert finding.verdict == verdict and finding.quantity == "step time, new / old"


def test_a_paper_is_reproduced_where_every_claim_is() -> None:
    yes, no, unsure = (CLAIM.judge(numbers(*d)) for d in ((-2.0, -2.1), (2.0, 2.1), (-2.0, 2.1)))
    assert verdict_of_all([yes, yes]) == "reproduced"
    assert verdict_of_all([yes, unsure]) == "inconclusive"
    assert verdict_of_all([yes, unsure, no]) == "not reproduced"


def test_an_arm_without_the_measure_cannot_be_compared() -> None:
    claim = Lower(says="", published="", measure=DROPPED, arm="new", than="dense")
    values = {"new": {0: 0.1, 1: 0.2, 2: 0.1}, "dense": {0: None, 1: None, 2: None}}
    with pytest.raises(ValueError, match="dense has no held-out share dropped"):
        claim.judge(Numbers({DROPPED.name: values}, {}))
