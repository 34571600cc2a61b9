"""What experts specialise in: figures by hand, and what chance gives."""

import math

import numpy as np
import pytest

from dynamoe.experiments.training.routing_counts import RoutingCounts
from dynamoe.experiments.training.specialization import (
    coactivation,
    favourite_tokens,
    halves_apart,
    mutual_information,
    pairs_up,
    strongest_pairs,
    token_specialization,
    total_variation,
)

# Experts 0 and 1 share 8 of their 16 and 10 tokens; expert 2 has 4 tokens, one with each; expert 3 has none.
TOGETHER = np.array([[16, 8, 1, 0], [8, 10, 1, 0], [1, 1, 4, 0], [0, 0, 0, 0]])


def counts(by_id: list[list[int]], occurrences: list[int] | None = None, *, tokens: int | None = None) -> RoutingCounts:
    table = np.array(by_id)
    often = table.sum(axis=1) if occurrences is None else np.array(occurrences)
    total = int(often.sum()) if tokens is None else tokens
    return RoutingCounts(
        np.diag(table.sum(axis=0)), total, 100 + np.arange(len(table)), often, table, np.stack([table.sum(axis=0)] * 2)
    )


def test_coactivation_is_the_share_of_the_rows_tokens() -> None:
    shares = coactivation(TOGETHER)
    np.testing.assert_allclose(shares[0], [np.nan, 0.5, 1 / 16, 0.0])
    np.testing.assert_allclose(shares[1], [0.8, np.nan, 0.1, 0.0])
    assert np.isnan(shares[3]).all()  # an idle expert has no tokens to share


def test_pairs_are_ranked_by_what_both_share_and_set_against_the_load() -> None:
    first, second, third = strongest_pairs(TOGETHER, most=3)
    # 8 / sqrt(16 * 10) = 0.63, then 1 / sqrt(10 * 4) = 0.158, 1 / sqrt(16 * 4) = 0.125.
    assert [(pair.first, pair.second) for pair in (first, second, third)] == [(0, 1), (1, 2), (0, 2)]
    assert (first.tokens, first.of_first, first.of_second) == (8, 0.5, 0.8)
    # Ten pairs fall on products of loads 160, 64 and 40, so on experts 0 and 1 there would be 10 * 160 / 264.
    assert first.over_chance == pytest.approx(8 / (10 * 160 / 264))
    assert len(strongest_pairs(TOGETHER, most=1)) == 1


def test_one_expert_per_token_makes_no_pairs() -> None:
    assert not pairs_up(counts([[3, 1], [0, 2]]))
    assert strongest_pairs(np.diag([3, 2]), most=5) == []


def test_mutual_information_is_one_bit_where_the_token_decides_between_two_experts() -> None:
    assert mutual_information(np.array([[8, 0], [0, 8]])) == pytest.approx(1.0)
    assert mutual_information(np.array([[4, 4], [4, 4]])) == pytest.approx(0.0)
    # Rows (3, 1) and (1, 3) of eight: 2 - H(rows and columns) = 2 - (3/4 log2 8/3 + 1/4 log2 8).
    expected = 2 - (0.75 * math.log2(8 / 3) + 0.25 * 3)
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(expected)


def test_tokens_that_decide_their_expert_stand_out_from_chance() -> None:
    found = token_specialization(counts([[400, 0], [0, 200], [150, 50], [2, 3]]))
    assert found.entropy == pytest.approx(-(552 / 805) * math.log2(552 / 805) - (253 / 805) * math.log2(253 / 805))
    assert found.favourite == pytest.approx((1 + 1 + 0.75) / 3)  # the last id occurs 5 times: too seldom
    assert found.often == 3 and found.counted == 1.0
    assert found.information > 0.5 > 0.05 > found.information_by_chance
    assert 0.6 < found.favourite_by_chance < 0.8  # about the load of the busier expert, 552 of 805


def test_two_experts_per_token_each_take_a_share_of_its_occurrences() -> None:
    found = token_specialization(counts([[20, 20, 0], [30, 0, 30]], [20, 30], tokens=100))
    assert found.favourite == 1.0 and found.counted == 0.5


def test_a_layer_that_nobody_used_has_no_figures() -> None:
    found = token_specialization(counts([[0, 0]], [20]))
    assert np.isnan(found[:5]).all() and found.often == 1


def test_favourites_are_the_ids_with_the_largest_shares_the_frequent_first() -> None:
    found = counts([[10, 30], [0, 20], [12, 0], [0, 12], [0, 5]])
    assert favourite_tokens(found, 1, most=3) == [(101, 1.0), (103, 1.0), (100, 0.75)]
    assert favourite_tokens(found, 0, most=3) == [(102, 1.0), (100, 0.25)]


def test_total_variation_is_the_share_that_would_have_to_move() -> None:
    assert total_variation(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])) == 0.25
    assert total_variation(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0


def test_halves_differ_by_their_own_shares() -> None:
    of = counts([[1, 1]])
    assert halves_apart(of._replace(halves=np.array([[6, 2], [2, 2]]))) == pytest.approx(0.25)  # 3/4 against 1/2
    assert np.isnan(halves_apart(of._replace(halves=np.array([[6, 2], [0, 0]]))))
