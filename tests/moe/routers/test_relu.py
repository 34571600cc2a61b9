"""ReLU routing: weights, loss and coefficient by hand; what a bound cuts off; and that the sparsity is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import Carried, DenseDispatcher, MoE, ReLURouting, Routing, RoutingContext, SwiGLU
from dynamoe.moe.telemetry import ROUTERS_OWN, moe_stats

E = 4
TRAINING = RoutingContext(training=True)
# Token 0 has experts 2 and 0, token 1 has expert 0.
LOGITS = jnp.array([[1.0, -1.0, 2.0, 0.0], [3.0, -1.0, -1.0, -1.0]])


def build(coefficient=0.5, **options):
    """A router with the identity as the gate's kernel: the input is the logits."""
    config = ReLURouting(initial_coefficient=coefficient, **options)
    router = config.build(width=E, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E)
    return router


def test_the_experts_and_weights_are_the_positive_logits():
    routing, state = build()(LOGITS, RoutingContext())
    assert state is None and routing.token is None
    np.testing.assert_array_equal(routing.expert, [2, 0, E, E, 0, E, E, E])
    np.testing.assert_array_equal(routing.weight, [2, 1, 0, 0, 3, 0, 0, 0])
    np.testing.assert_allclose(routing.probs, [[1 / 3, 0, 2 / 3, 0], [1, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("padding", [0, 3])
def test_the_loss_presses_busy_experts_harder(padding):
    # Expert 0 gets both tokens, f_0 = 4 / 1 * 1, expert 2 one, f_2 = 4 / 1 * 0.5; their mean weights are 2 and 1.
    # The sum is 8 + 2 = 10, half of it the loss. Padding adds nothing.
    logits = jnp.concatenate([LOGITS, jnp.full((padding, E), 7.0)])
    routing, _ = build(k=1)(logits, RoutingContext(mask=jnp.arange(2 + padding) < 2))
    np.testing.assert_allclose(routing.loss, 5.0, rtol=1e-6)
    # The shares are constants: with respect to a token's positive logits it is 0.5 * f_e / 2 tokens.
    gradient = jax.grad(lambda logits: build(k=1)(logits, RoutingContext())[0].loss)(LOGITS)
    np.testing.assert_allclose(gradient, [[1.0, 0, 0.5, 0], [1.0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "k", "factor"),
    [
        (LOGITS, 1, 1.5),  # 3 of 8 are active, 2 should be: more pressure
        (LOGITS, 2, 1 / 1.5),  # 4 should be
        (LOGITS[:1], 2, 1.0),  # 2 of 4
    ],
)
def test_the_coefficient_follows_the_sparsity_in_training(logits, k, factor):
    _, state = build(k=k, adaptation=1.5)(logits, TRAINING)
    np.testing.assert_allclose(state["coefficient"], 0.5 * factor, rtol=1e-6)


def test_padding_has_no_say_in_the_coefficient():
    logits = jnp.concatenate([LOGITS, jnp.full((6, E), 7.0)])
    _, state = build(k=2, adaptation=1.5)(logits, TRAINING._replace(mask=jnp.arange(8) < 2))
    np.testing.assert_allclose(state["coefficient"], 0.5 / 1.5, rtol=1e-6)
    _, state = build(k=2, adaptation=1.5)(logits, TRAINING._replace(mask=jnp.zeros(8, bool)))
    assert state["coefficient"] == 0.5


@pytest.mark.parametrize(("coefficient", "logits"), [(1e-12, -LOGITS[1:]), (1e6, LOGITS[1:] * 0 + 1)])
def test_the_coefficient_never_reaches_zero_or_infinity(coefficient, logits):
    k = 4 if coefficient < 1 else 1
    _, state = build(coefficient, k=k)(logits, TRAINING)
    np.testing.assert_allclose(state["coefficient"], coefficient, rtol=1e-6)


def test_what_the_bound_cuts_off_is_the_smallest_and_is_counted():
    routing, state = build(k=1, most=1)(LOGITS, TRAINING)
    np.testing.assert_array_equal(routing.expert, [2, 0])
    np.testing.assert_array_equal(routing.weight, [2, 3])
    assert routing.cut_off == 1
    # The loss and the coefficient see what was wanted, not what was kept.
    whole, whole_state = build(k=1)(LOGITS, TRAINING)
    assert whole.cut_off == 0 and routing.loss == whole.loss and state == whole_state


def test_what_the_router_cut_off_counts_as_dropped():
    # 8 assignments, of which a dispatcher dropped a quarter, 2; 4 more were cut off before: 6 of 12.
    zeros = jnp.zeros((4, E))
    routing = Routing(jnp.zeros(8, jnp.int32), jnp.ones(8), None, zeros, zeros, cut_off=jnp.int32(4))
    carried = Carried(zeros, dropped=jnp.float32(0.25), overflow=jnp.float32(0.0))
    assert moe_stats(routing, RoutingContext(), (), carried, {}).dropped == 0.5
    nothing = routing._replace(expert=jnp.full(8, E), cut_off=jnp.int32(0))
    carried = carried._replace(dropped=jnp.float32(0.0))
    assert moe_stats(nothing, RoutingContext(), (), carried, {}).dropped == 0


def test_the_loss_and_the_coefficient_go_through_the_layer(key):
    router = ReLURouting(k=1, initial_coefficient=0.25)
    config = MoE(experts=E, router=router, expert=SwiGLU(hidden=4), dispatcher=DenseDispatcher(), losses=())
    layer = config.build(width=8, key=key)
    x = jax.random.normal(key, (6, 8))
    _, stats = layer(x, TRAINING)
    routing, _ = layer.router(x, TRAINING)
    assert stats.loss == stats.losses[ROUTERS_OWN] == routing.loss > 0
    layer.update_router_state(stats.router_state)
    np.testing.assert_allclose(layer.router.coefficient[...], 0.25 * 1.2, rtol=1e-6)


def test_training_holds_the_sparsity():
    # A task that wants every expert for every token: the sum of the weights is to be large.
    # What all tokens share, here feature 0, is how a gate without a bias can turn an expert off.
    x = jax.random.normal(jax.random.key(1), (64, 16)).at[:, 0].set(2.0)
    config = ReLURouting(k=2, initial_coefficient=1e-2, adaptation=1.05)
    router = config.build(width=16, experts=8, key=jax.random.key(2))
    graph, params, others = nnx.split(router, nnx.Param, ...)

    def step(carry, _):
        def loss(params):
            routing, state = nnx.merge(graph, params, carry[1])(x, TRAINING)
            return routing.loss - 0.1 * routing.weight.sum() / 64, (state, (routing.expert < 8).sum() / 64)

        gradient, (state, experts_per_token) = jax.grad(loss, has_aux=True)(carry[0])
        router = nnx.merge(graph, jax.tree.map(lambda p, g: p - 0.3 * g, carry[0], gradient), carry[1])
        router.coefficient[...] = state["coefficient"]
        _, *carry = nnx.split(router, nnx.Param, ...)
        return tuple(carry), experts_per_token

    _, experts_per_token = jax.jit(lambda: jax.lax.scan(step, (params, others), length=300))()
    assert experts_per_token[0] > 3
    np.testing.assert_allclose(experts_per_token[-100:].mean(), 2.0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"ReLURouting\.k is 0; it must be at least 1"),
        ({"k": 3, "most": 2}, r"ReLURouting\.most is 2; with k=3 it must be at least 3, or None"),
        ({"initial_coefficient": 0.0}, r"initial_coefficient is 0\.0; it must be from 1e-12 to 1e\+06"),
        ({"adaptation": 1.0}, r"adaptation is 1\.0; it must be above 1 and finite"),
        ({"k": 5}, r"ReLURouting\.k is 5; with 4 experts it must be at most 4"),
        ({"most": 5}, r"ReLURouting\.most is 5; with 4 experts it must be at most 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReLURouting(**options).build(width=8, experts=4, key=jax.random.key(0))
