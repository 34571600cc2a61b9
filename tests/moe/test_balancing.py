"""Loss-free balancing: by hand, against a loop in float64, and through the layer that stores the bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import DenseDispatcher, LossFree, MoE, RouterState, RoutingContext, Sigmoid, SwiGLU, TopK
from dynamoe.moe.routing import NO_CONTEXT

T, D, E = 12, 8, 4
TRAINING = RoutingContext(training=True)
MASK = jnp.arange(T) % 3 != 1
CONFIG = TopK(k=2, scores=Sigmoid(), balancing=LossFree(rate=0.01))


def built(config=CONFIG, bias=None):
    router = config.build(width=D, experts=E, key=jax.random.key(3))
    if bias is not None:
        router.balancing.bias[...] = jnp.asarray(bias, jnp.float32)
    return router


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (T, D))


def test_the_bias_chooses_and_the_score_alone_weighs():
    # sigmoid(log(p / (1 - p))) = p: the scores are (0.3, 0.9, 0.2, 0.6). With the bias (0, -0.8, 0.5, 0) the choice is
    # by (0.3, 0.1, 0.7, 0.6): expert 2, then 3. They weigh 0.2 / 0.8 and 0.6 / 0.8.
    router = TopK(k=2, scores=Sigmoid(), balancing=LossFree()).build(width=4, experts=4, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(4)
    router.balancing.bias[...] = jnp.array([0.0, -0.8, 0.5, 0.0])
    scores = jnp.array([[0.3, 0.9, 0.2, 0.6]])
    routing, _ = router(jnp.log(scores / (1 - scores)), NO_CONTEXT)
    np.testing.assert_array_equal(routing.expert, [2, 3])
    np.testing.assert_allclose(routing.weight, [0.25, 0.75], rtol=1e-6)


def test_the_bias_moves_by_the_rate_towards_the_mean_load():
    # 8 assignments to 4 experts, 2 each on average: the busy expert 0 loses the rate, the idle 2 and 3 gain it, and
    # expert 1, whose load is the mean, keeps its bias.
    bias = built(CONFIG, [0.5, 0.5, 0.5, 0.5]).balancing.updated(jnp.array([5, 2, 1, 0]))["bias"]
    np.testing.assert_allclose(bias, [0.49, 0.5, 0.51, 0.51], rtol=1e-6)


def test_the_load_is_that_of_the_real_tokens(x):
    router = built(bias=[0.3, 0.0, -0.2, 0.1])
    _, state = router(x, TRAINING._replace(mask=MASK))
    scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(router.gate.kernel[...], np.float64)))
    bias = np.asarray(router.balancing.bias[...], np.float64)
    load = np.zeros(E)
    for token in np.flatnonzero(MASK):
        load[np.argsort(-(scores[token] + bias))[:2]] += 1
    assert load.max() > load.mean() > load.min()
    np.testing.assert_allclose(state["balancing.bias"], bias + 0.01 * np.sign(load.mean() - load), rtol=1e-6)


def test_a_batch_of_padding_alone_moves_nothing(x):
    _, state = built()(x, TRAINING._replace(mask=jnp.zeros(T, bool)))
    np.testing.assert_array_equal(state["balancing.bias"], np.zeros(E))


def test_the_bias_rests_in_evaluation(x):
    assert built()(x, NO_CONTEXT)[1] is None


def test_the_bias_is_no_parameter_and_has_no_gradient(x):
    graph, params, variables = nnx.split(built(bias=[0.3, 0.0, -0.2, 0.1]), nnx.Param, RouterState)
    assert [path for path, _ in nnx.to_flat_state(params)] == [("gate", "kernel")]

    def loss(params, variables):
        return jnp.square(nnx.merge(graph, params, variables)(x, TRAINING)[0].weight).sum()

    of_params, of_variables = jax.jit(jax.grad(loss, (0, 1)))(params, variables)
    assert np.abs(of_params["gate"]["kernel"][...]).max() > 1e-3
    np.testing.assert_array_equal(of_variables["balancing"]["bias"][...], np.zeros(E))


def test_a_lopsided_router_is_balanced_within_some_batches(key):
    # Every token prefers expert 0, then 1. A bias moves by 0.02 a batch; scores lie between 0 and 1.
    router = built(TopK(k=1, renormalize=False, scores=Sigmoid(), balancing=LossFree(rate=0.02)))
    x = jax.random.normal(key, (64, D)).at[:, 0].set(1.0)
    router.gate.kernel[...] = router.gate.kernel[...].at[0].add(jnp.array([3.0, 1.0, 0.0, 0.0]))
    graph, variables, params = nnx.split(router, RouterState, ...)
    batch = jax.jit(lambda variables: nnx.merge(graph, variables, params)(x, TRAINING))
    violations = []
    for _ in range(60):
        routing, state = batch(variables)
        variables["balancing"]["bias"][...] = state["balancing.bias"]
        load = np.bincount(np.asarray(routing.expert), minlength=E)
        violations.append(load.max() / load.mean() - 1)
    assert violations[0] > 1.5 and np.mean(violations[-5:]) < 0.5


def test_the_layer_returns_the_new_bias_and_stores_it_when_told(x):
    layer = MoE(experts=E, router=CONFIG, expert=SwiGLU(hidden=8), dispatcher=DenseDispatcher()).build(
        width=D, key=jax.random.key(1)
    )
    _, stats = layer(x, TRAINING)
    assert list(stats.router_state) == ["balancing.bias"] and not layer.router.balancing.bias[...].any()
    layer.update_router_state(stats.router_state)
    np.testing.assert_array_equal(layer.router.balancing.bias[...], stats.router_state["balancing.bias"])
    assert layer.router.balancing.bias[...].any()


@pytest.mark.parametrize("rate", [0.0, -0.1, float("inf"), float("nan")])
def test_a_rate_outside_of_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=rf"LossFree\.rate is {rate}; it must be above 0 and finite"):
        LossFree(rate=rate)
