"""Top-p routing: by hand, and against a loop in float64. The contract of all routers is in ../test_routers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import EntropyLoss, MoE, Routing, RoutingContext, TopP
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


def test_entropy_loss_by_hand():
    # Entropies log 4 = 1.3863 and -(0.5 log 0.5 + 2 * 0.25 log 0.25) = 1.0397; the third token is padding.
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 1e-20], [0.7, 0.1, 0.1, 0.1]]))
    routing = Routing(jnp.arange(3), jnp.ones(3), None, logits, jax.nn.softmax(logits))
    context = RoutingContext(mask=jnp.array([True, True, False]))
    np.testing.assert_allclose(EntropyLoss()(routing, context), (1.3863 + 1.0397) / 2, atol=1e-4)


def test_the_entropy_loss_sharpens_even_a_router_that_is_sure():
    def loss(logits):
        nothing = jnp.zeros(1, jnp.int32), jnp.ones(1), None
        return EntropyLoss()(Routing(*nothing, logits, jax.nn.softmax(logits)), NO_CONTEXT)

    gradient = jax.grad(loss)(jnp.array([[1.0, 0.0, -200.0]]))
    assert np.isfinite(gradient).all() and gradient[0, 0] < 0 < gradient[0, 1]


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
