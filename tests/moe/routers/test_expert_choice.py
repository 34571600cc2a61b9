"""Expert choice: by hand, against a loop in float64, padding and routing groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import ExpertChoice, MoE, RoutingContext
from dynamoe.moe.routing import NO_CONTEXT

T, E = 11, 4
MASK = np.arange(T) % 4 != 1


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(2), (T, E))


def choose(config, logits, context=NO_CONTEXT):
    """Route with the identity as the gate's kernel: the input is the logits."""
    router = config.build(width=logits.shape[1], experts=logits.shape[1], key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(logits.shape[1])
    routing, state = router(logits, context)
    assert state is None
    return routing


def pairs(routing):
    """{(token, expert): weight} of all that is assigned to somebody."""
    rows = zip(*(np.asarray(a).tolist() for a in (routing.token, routing.expert, routing.weight)), strict=True)
    found = [((token, expert), weight) for token, expert, weight in rows if expert < routing.logits.shape[1]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_by_hand():
    # 4 tokens, 2 experts, one expert per token on average: each expert takes 4 * 1 / 2 = 2 tokens. Expert 0 scores
    # 0.9, 0.6, 0.7, 0.2 and takes tokens 0 and 2; expert 1 scores 0.1, 0.4, 0.3, 0.8 and takes tokens 3 and 1.
    routing = choose(ExpertChoice(capacity_factor=1.0), jnp.log(jnp.array([[9.0, 1], [6, 4], [7, 3], [2, 8]])))
    found = pairs(routing)
    assert sorted(found) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    np.testing.assert_allclose([found[pair] for pair in sorted(found)], [0.9, 0.4, 0.7, 0.8], rtol=1e-6)


def loop(logits, factor, group, mask):
    """The definition: in each group, each expert takes its best tokens; float64."""
    odds = np.exp(np.asarray(logits, np.float64))
    scores, found = odds / odds.sum(axis=1, keepdims=True), {}
    for start in range(0, T, group):
        real = [token for token in range(start, min(start + group, T)) if mask[token]]
        for expert in range(E):
            best = sorted(real, key=lambda token: -scores[token, expert])  # noqa: B023
            for token in best[: math.ceil(len(real) * factor / E)]:
                found[token, expert] = scores[token, expert]
    return found


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("group", [None, 4, 100])
@pytest.mark.parametrize(
    "mask", [np.ones(T, bool), MASK, np.arange(T) >= 8], ids=["all real", "padding", "empty groups"]
)
def test_equals_a_loop_over_groups_and_experts(logits, factor, group, mask):
    config = ExpertChoice(capacity_factor=factor, routing_group=group)
    found = pairs(choose(config, logits, RoutingContext(mask=jnp.array(mask))))
    expected = loop(logits, factor, min(group or T, T), mask)
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose([found[pair] for pair in expected], list(expected.values()), rtol=1e-5)


def test_a_padded_batch_is_routed_as_the_same_batch_without_padding(logits):
    config = ExpertChoice(capacity_factor=1.5)
    padded = pairs(choose(config, logits, RoutingContext(mask=jnp.array(MASK))))
    kept = np.flatnonzero(MASK)
    cut = {(kept[token], expert): weight for (token, expert), weight in pairs(choose(config, logits[kept])).items()}
    assert padded.keys() == cut.keys()
    np.testing.assert_allclose([padded[pair] for pair in cut], list(cut.values()), rtol=1e-6)


def test_a_group_knows_nothing_of_the_others(logits):
    config = ExpertChoice(capacity_factor=1.0, routing_group=4)
    before, after = (pairs(choose(config, x)) for x in (logits, logits.at[4:8].multiply(-2.0)))
    outside = [pair for pair in before if not 4 <= pair[0] < 8]
    assert before != after and [before[pair] for pair in outside] == [after.get(pair) for pair in outside]


def test_places_are_rounded_up_but_not_by_a_rounding_error():
    # 20 tokens, 2 experts: 20 * 1.1 / 2 is 11, in float64 11.000000000000002, and 1.11 asks for 11.1.
    logits = jax.random.normal(jax.random.key(0), (50, 2))
    assert choose(ExpertChoice(capacity_factor=1.1), logits[:20]).expert.shape == (2 * 11,)
    assert choose(ExpertChoice(capacity_factor=1.11), logits[:20]).expert.shape == (2 * 12,)
    # 25 real tokens of 50: 25 * 1.2 / 2 is 15, in float32 15.000001.
    masked = RoutingContext(mask=jnp.arange(50) < 25)
    assert len(pairs(choose(ExpertChoice(capacity_factor=1.2), logits, masked))) == 2 * 15


def test_as_many_experts_per_token_as_the_capacity_factor_says():
    assert MoE(experts=8, router=ExpertChoice(capacity_factor=2.0), losses=()).active_fraction == 0.25


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_factor_that_is_not_positive_and_finite_is_refused(factor):
    with pytest.raises(ValueError, match=rf"capacity_factor is {factor}; it must be above 0 and finite"):
        ExpertChoice(capacity_factor=factor)


def test_more_than_all_experts_per_token_are_refused():
    with pytest.raises(ValueError, match=r"capacity_factor is 4\.5; with 4 experts it must be at most 4"):
        ExpertChoice(capacity_factor=4.5).build(width=8, experts=4, key=jax.random.key(0))


def test_a_routing_group_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"ExpertChoice\.routing_group is 0; it must be at least 1 token, or None"):
        ExpertChoice(routing_group=0)
