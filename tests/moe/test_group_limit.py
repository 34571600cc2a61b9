"""Group-limited selection by hand, and against a loop over all choices of groups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import GroupLimit, LossFree, Sigmoid, TopK
from dynamoe.moe.routing import NO_CONTEXT


@pytest.mark.parametrize(
    ("best", "kept"),
    # Groups (0.9, 0.0), (0.5, 0.6), (0.1, 0.2). By their two best: 0.9, 1.1, 0.3: the second group is kept. By their
    # best alone: 0.9, 0.6, 0.2: the first.
    [(2, [2, 3]), (1, [0, 1])],
)
def test_a_groups_score_is_the_sum_of_its_best(best, kept):
    selection = jnp.array([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2]])
    limited = np.asarray(GroupLimit(groups=3, chosen=1, best=best)(selection))[0]
    expected = np.full(6, -np.inf)
    expected[kept] = np.asarray(selection)[0, kept]
    np.testing.assert_array_equal(limited, expected)


def test_experts_outside_of_the_groups_are_not_chosen_even_with_negative_scores():
    # A bias far below zero: 0 in place of -inf outside of the groups would win.
    router = TopK(k=2, scores=Sigmoid(), balancing=LossFree(), groups=GroupLimit(groups=2, chosen=1)).build(
        width=4, experts=4, key=jax.random.key(0)
    )
    router.gate.kernel[...] = jnp.eye(4)
    router.balancing.bias[...] = jnp.full(4, -5.0)
    routing, _ = router(jnp.array([[2.0, 1.0, 3.0, -3.0]]), NO_CONTEXT)
    # Sigmoids (0.88, 0.73, 0.95, 0.05): the first group's sum is larger.
    np.testing.assert_array_equal(routing.expert, [0, 1])


def test_the_choice_is_the_best_among_the_best_groups(key):
    experts, groups, chosen, k = 12, 4, 2, 3
    config = TopK(k=k, renormalize=False, groups=GroupLimit(groups=groups, chosen=chosen))
    router = config.build(width=5, experts=experts, key=key)
    x = jax.random.normal(jax.random.fold_in(key, 1), (20, 5))
    routing, _ = router(x, NO_CONTEXT)
    for token, probs in enumerate(np.asarray(routing.probs)):
        members = np.arange(experts).reshape(groups, -1)
        value = {g: np.sort(probs[members[g]])[-2:].sum() for g in range(groups)}
        best = max(itertools.combinations(range(groups), chosen), key=lambda some: sum(value[g] for g in some))  # noqa: B023
        allowed = members[list(best)].ravel()
        expected = allowed[np.argsort(-probs[allowed])][:k]
        np.testing.assert_array_equal(routing.expert[token * k : (token + 1) * k], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, r"GroupLimit\.groups is 0; it must be at least 1"),
        ({"best": 0}, r"GroupLimit\.best is 0; it must be at least 1"),
        ({"groups": 4, "chosen": 5}, r"GroupLimit\.chosen is 5; with 4 groups it must be at most 4"),
    ],
)
def test_a_bad_limit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupLimit(**arguments)


@pytest.mark.parametrize(
    ("limit", "k", "message"),
    [
        (GroupLimit(groups=3, chosen=1), 2, r"GroupLimit\.groups is 3; it must divide the 8 experts"),
        (GroupLimit(groups=8, chosen=2), 2, r"GroupLimit\.best is 2; with groups of 1 experts it must be at most 1"),
        (GroupLimit(groups=4, chosen=1), 3, r"GroupLimit\.chosen is 1; 1 groups of 2 experts are too few for k=3"),
    ],
)
def test_a_limit_that_does_not_fit_the_router_is_refused(limit, k, message, key):
    with pytest.raises(ValueError, match=message):
        TopK(k=k, groups=limit).build(width=4, experts=8, key=key)
