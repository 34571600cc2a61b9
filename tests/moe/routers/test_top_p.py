"""Top-p routing: by hand, and against a loop in float64. The contract of all routers is in ../test_routers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import MoE, RoutingContext, TopP
from dynamoe.moe.routing import NO_CONTEXT

E = 4


def route(config, probs, context=NO_CONTEXT):
    """Route tokens of given probabilities."""
    router = config.build(width=E, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E)
    return router(jnp.log(jnp.asarray(probs, jnp.float32)), context)[0]


@pytest.mark.parametrize(
    ("p", "most", "taken"),
    # Sorted: expert 1 with 0.45, expert 3 with 0.3, expert 2 with 0.15, expert 0 with 0.1; together 0.45, 0.75, 0.9, 1.
    [(0.1, 4, 1), (0.4, 4, 1), (0.5, 4, 2), (0.7, 4, 2), (0.8, 4, 3), (0.95, 4, 4), (0.95, 2, 2)],
)
def test_the_smallest_set_that_reaches_p(p, most, taken):
    routing = route(TopP(p=p, most=most, experts_per_token=1.0), [[0.1, 0.45, 0.15, 0.3]])
    expert, weight = [1, 3, 2, 0], [0.45, 0.3, 0.15, 0.1]
    np.testing.assert_array_equal(routing.expert, (expert[:taken] + [E] * 4)[:most])
    np.testing.assert_allclose(routing.weight, (weight[:taken] + [0.0] * 4)[:most], rtol=1e-5)


def test_top_p_equals_a_loop_in_float64():
    probs = np.asarray(jax.nn.softmax(2 * jax.random.normal(jax.random.key(2), (30, E))))
    routing = route(TopP(p=0.7, most=3), probs)
    counts = []
    for token, row in enumerate(probs.astype(np.float64)):
        chosen, total = [], 0.0
        for expert in np.argsort(-row):
            if total >= 0.7 or len(chosen) == 3:
                break
            chosen.append(expert)
            total += row[expert]
        at = slice(3 * token, 3 * token + 3)
        np.testing.assert_array_equal(routing.expert[at], chosen + [E] * (3 - len(chosen)))
        np.testing.assert_allclose(routing.weight[at][: len(chosen)], row[chosen], rtol=1e-5)
        counts.append(len(chosen))
    assert set(counts) == {1, 2, 3}


def test_the_estimate_of_the_mean_is_what_the_costs_are_counted_by():
    assert MoE(experts=8, router=TopP(p=0.4, most=4, experts_per_token=1.5)).active_fraction == 1.5 / 8


def test_what_the_bound_cuts_off_is_counted():
    # Probabilities (0.4, 0.3, 0.2, 0.1) reach 0.8 with three experts, one more than the bound; (0.85, ...) with one.
    probs = [[0.4, 0.3, 0.2, 0.1], [0.85, 0.05, 0.05, 0.05], [0.25, 0.25, 0.25, 0.25]]
    assert int(route(TopP(p=0.8, most=2), probs, RoutingContext(mask=jnp.array([True, True, False]))).cut_off) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.0}, r"TopP\.p is 0\.0; it must be above 0 and at most 1"),
        ({"p": 1.1}, r"TopP\.p is 1\.1; it must be above 0 and at most 1"),
        ({"most": 0}, r"TopP\.most is 0; it must be at least 1 expert per token"),
        ({"experts_per_token": 5.0}, r"TopP\.experts_per_token is 5\.0; with most=4 it must lie between 1 and 4"),
        ({"experts_per_token": 0.5}, r"TopP\.experts_per_token is 0\.5; with most=4 it must lie between 1 and 4"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopP(**arguments)


def test_a_bound_above_the_number_of_experts_is_refused(key):
    with pytest.raises(ValueError, match=r"TopP\.most is 5; with 4 experts it must be at most 4"):
        TopP(most=5).build(width=E, experts=E, key=key)
