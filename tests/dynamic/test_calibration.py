"""Learn-then-Test: the walk by hand, its guarantee by simulation, its record, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dynamoe.dynamic import (
    Constant,
    Guarantee,
    HoeffdingBentkus,
    NeverExit,
    Patience,
    PerExit,
    Policy,
    Top2Gap,
    learn_then_test,
    units_needed,
)
from dynamoe.dynamic.simulated_calibration import SETTINGS, simulate

POLICY = Policy(
    confidence=Top2Gap().describe(),
    exits=(2, 4, 6),
    thresholds="constant",
    keys_values="projected from the exit's state",
    batch="each row",
    model="a1b2",
)
ASKED = dict(policy=POLICY, risk="disagreement with the full model", unit="prompts", delta=0.1, epsilon=0.05)


def losses_of(lost: list[int], n: int = 100) -> np.ndarray:
    """Of each candidate the first so many units are lost."""
    return (np.arange(n)[:, None] < np.array(lost)[None]).astype(np.float64)


def test_the_walk_stops_at_the_first_failure_and_keeps_the_last_pass():
    # p of 0, 2, 3, 9, 0 lost of 100 at delta 0.1: the fourth fails, so the fifth is never looked at.
    losses, candidates = losses_of([0, 2, 3, 9, 0]), (0.9, 0.8, 0.7, 0.6, 0.5)
    p = HoeffdingBentkus()(losses, 0.1, 0.05)
    assert list(p <= 0.05) == [True, True, True, False, True]
    found = learn_then_test(losses, candidates, costs=losses + 1, **ASKED)
    assert (found.threshold, found.n, found.empirical_risk) == (0.7, 100, 0.03)
    assert found.p_value == p[2]
    np.testing.assert_allclose(found.cost, 1.03)


def test_where_nothing_passes_the_full_model_answers():
    found = learn_then_test(losses_of([50, 60]), (0.9, 0.8), **ASKED)
    assert found.threshold is None
    assert isinstance(found.thresholds_for(POLICY), NeverExit)
    assert "the full model always answers" in found.statement


def test_units_needed_is_where_0_lost_first_suffice():
    # (1 - delta)^n <= epsilon: 0.95^59 = 0.0485, 0.95^58 = 0.0510.
    assert units_needed(0.05, 0.05) == 59
    assert units_needed(0.5, 0.5) == 1
    with pytest.raises(ValueError, match=r"losses has 58 units; delta = 0.05 with epsilon = 0.05 needs at least 59"):
        learn_then_test(losses_of([0], 58), (0.5,), **ASKED | {"delta": 0.05})
    assert learn_then_test(losses_of([0], 59), (0.5,), **ASKED | {"delta": 0.05}).threshold == 0.5


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_violations_are_at_most_epsilon_and_the_choice_is_not_wasteful(setting):
    # 300 draws here; `python -m dynamoe.dynamic.simulated_calibration` prints the figure of 2,000.
    found = simulate(setting, draws=300, seed=0)
    assert found.interval[1] <= setting.epsilon
    assert found.mean_risk > 0.5 * setting.delta


def test_a_guarantee_says_what_it_holds_for_and_survives_json():
    found = learn_then_test(losses_of([0, 2]), (0.9, 0.8), **ASKED)
    assert found.statement.startswith(
        "With probability at least 0.95 over calibration sets of 100 prompts, the expected disagreement with the full "
        "model is at most 0.1, where prompts are drawn as those were."
    )
    text = found.to_json()
    again = Guarantee.from_json(text)
    assert again.to_json() == text
    assert again.policy == found.policy
    assert again.thresholds_for(POLICY) == Constant(threshold=0.8)


def test_a_guarantee_of_several_thresholds_survives_json():
    policy = replace(POLICY, thresholds="per exit")
    found = learn_then_test(losses_of([0, 2]), ((0.9, 0.8), (0.8, 0.8)), **ASKED | {"policy": policy})
    assert Guarantee.from_json(found.to_json()).thresholds_for(policy) == PerExit(thresholds=(0.8, 0.8))


def test_thresholds_of_another_kind_are_not_taken_for_constant_ones():
    policy = replace(POLICY, thresholds="decaying, tau 4, 64 tokens")
    found = learn_then_test(losses_of([0]), (0.9,), **ASKED | {"policy": policy})
    found.check(policy)
    with pytest.raises(ValueError, match=r"policy.thresholds is 'decaying, tau 4, 64 tokens'; of 0.9 only 'constant'"):
        found.thresholds_for(policy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"confidence": Patience(most=3).describe()}, r"policy.confidence is .*Patience.* calibrated with .*Top2Gap"),
        ({"exits": (2, 4)}, r"policy.exits is \(2, 4\), but the guarantee was calibrated with \(2, 4, 6\)"),
        ({"thresholds": "decaying"}, r"policy.thresholds is 'decaying'"),
        ({"keys_values": "none"}, r"policy.keys_values is 'none'"),
        ({"batch": "all rows together"}, r"policy.batch is 'all rows together', but .* 'each row'"),
        ({"model": "c3d4"}, r"policy.model is 'c3d4'"),
    ],
)
def test_another_policy_than_the_calibrated_one_is_refused(change, message):
    found = Guarantee.from_json(learn_then_test(losses_of([0]), (0.9,), **ASKED).to_json())
    found.check(POLICY)
    with pytest.raises(ValueError, match=message):
        found.thresholds_for(replace(POLICY, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": 0.2}, "the file was changed by hand"),
        ({"epsilon": 1.5}, "epsilon is 1.5; it must be above 0 and below 1"),
        ({"n": "many"}, "guarantee.n is 'many'; it must be int"),
        ({"threshold": True}, "guarantee.threshold is True"),
        ({"more": 1}, "it must have exactly"),
        ({"policy": {}}, "guarantee's policy has .*it must have exactly"),
    ],
)
def test_a_changed_file_is_refused(change, message):
    record = json.loads(learn_then_test(losses_of([0]), (0.9,), **ASKED).to_json())
    with pytest.raises(ValueError, match=message):
        Guarantee.from_json(json.dumps(record | change))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"losses": losses_of([0]) + 1.5}, r"losses lie between 1.5 and 1.5; they must be 0 to 1"),
        ({"losses": losses_of([0]) * np.nan}, r"losses lie between nan"),
        ({"candidates": (0.9, 0.8)}, r"losses has the shape \(100, 1\) with 2 candidates"),
        ({"candidates": (1.2,)}, r"candidates is 1.2; it must be 0 to 1"),
        (
            {"losses": losses_of([0, 0]), "candidates": (0.8, 0.9)},
            r"candidates has \[0.9\] after \[0.8\]; they must desc",
        ),
        ({"delta": 0.0}, r"delta is 0.0; it must be above 0 and below 1"),
        ({"epsilon": 1.0}, r"epsilon is 1.0; it must be above 0 and below 1"),
        ({"costs": np.zeros((100, 2))}, r"costs has the shape \(100, 2\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        learn_then_test(**{"losses": losses_of([0]), "candidates": (0.9,), **ASKED, **arguments})
