"""Statistics of a layer, by hand and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import BalanceLoss, Carried, Routing, RoutingContext, ZLoss
from dynamoe.moe.telemetry import chosen_experts, coactivation_counts, moe_stats

E = 4


def measure(routing, mask=None, losses=()):
    carried = Carried(jnp.zeros((3, 2)), dropped=jnp.float32(0.25), overflow=jnp.float32(0.125))
    return moe_stats(routing, RoutingContext(mask=mask), losses, carried, router_state={"bias": jnp.ones(E)})


def routing_of(expert, probs):
    probs = jnp.array(probs, jnp.float32)
    flat = jnp.array(expert, jnp.int32).reshape(-1)
    return Routing(flat, jnp.ones(flat.shape), None, jnp.log(probs), probs)


def test_statistics_by_hand():
    # Three tokens with two experts each: experts 0, 1 | 0, 2 | 0, 1. Six assignments: load (3, 2, 1, 0) / 6.
    # MaxVio: (3/6) / (1/4) - 1 = 1. Importance: column means. Entropy of (1/2, 1/2, 0, 0) is log 2, of a uniform row
    # log 4, of a certain row 0: their mean is (log 2 + log 4 + 0) / 3 = log 2.
    probs = [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    stats = measure(routing_of([[0, 1], [0, 2], [0, 1]], probs))
    np.testing.assert_allclose(stats.load, [0.5, 1 / 3, 1 / 6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(stats.max_violation, 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.importance, [1.75 / 3, 0.25, 0.25 / 3, 0.25 / 3], rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, np.log(2), rtol=1e-6)
    assert stats.losses == {} and stats.loss == 0
    assert stats.dropped == 0.25 and stats.overflow == 0.125 and list(stats.router_state) == ["bias"]


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_equal_float64(masked):
    tokens, k = 10, 2
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(2), (tokens, E)))
    mask = np.arange(tokens) % 3 != 1 if masked else np.ones(tokens, bool)
    expert = np.where(mask[:, None], np.argsort(-np.asarray(probs), axis=1)[:, :k], E)
    stats = measure(routing_of(expert, probs), jnp.array(mask) if masked else None)

    real = np.asarray(probs, np.float64)[mask]
    load = np.bincount(expert[mask].ravel(), minlength=E) / (k * mask.sum())
    np.testing.assert_allclose(stats.load, load, rtol=1e-6)
    np.testing.assert_allclose(stats.load.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.importance, real.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(real * np.log(real)).sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.max_violation, load.max() / load.mean() - 1, rtol=1e-5)


def test_max_violation_is_zero_when_balanced_and_highest_when_one_expert_takes_all():
    uniform = [[0.25] * 4] * 4
    np.testing.assert_allclose(measure(routing_of([0, 1, 2, 3], uniform)).max_violation, 0.0, atol=1e-6)
    np.testing.assert_allclose(measure(routing_of([2, 2, 2, 2], uniform)).max_violation, E - 1, rtol=1e-6)


def test_statistics_of_padding_alone_are_zero():
    stats = measure(routing_of([E, E], [[0.25] * 4] * 2), jnp.zeros(2, bool), (BalanceLoss(), ZLoss()))
    assert not np.any([stats.load.sum(), stats.importance.sum(), stats.entropy, stats.max_violation, stats.loss])


def test_entropy_of_a_certain_router_is_zero_with_a_finite_gradient():
    def entropy(probs):
        return measure(Routing(jnp.zeros(2, jnp.int32), jnp.ones(2), None, probs, probs)).entropy

    certain = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert entropy(certain) == 0
    assert np.isfinite(jax.grad(entropy)(certain)).all()


def test_loss_is_the_sum_of_the_losses_times_their_coefficients():
    routing = routing_of([0, 0], [[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    stats = measure(routing, None, (BalanceLoss(coefficient=0.25), ZLoss()))
    # The balance loss is 4 * 0.6 = 2.4 (see test_losses.py); logsumexp(log p) = log 1 = 0.
    np.testing.assert_allclose(stats.losses["BalanceLoss"], 2.4, rtol=1e-6)
    np.testing.assert_allclose(stats.losses["ZLoss"], 0.0, atol=1e-6)
    np.testing.assert_allclose(stats.loss, 0.25 * 2.4, rtol=1e-5)
    assert list(stats.losses) == ["BalanceLoss", "ZLoss"]


def test_coactivation_by_hand():
    # Tokens go to experts 0 and 1 | 2 and 0 | 1 and 0 | nobody. Together: 0 with 1 twice, 0 with 2 once.
    # On the diagonal the tokens of each: three, two, one, none.
    routing = routing_of([[0, 1], [2, 0], [1, 0], [E, E]], [[0.25] * 4] * 4)
    counts = coactivation_counts(routing)
    np.testing.assert_array_equal(counts, [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_coactivation_of_a_flat_routing_with_unequal_numbers_of_experts():
    # Five assignments of three tokens, in the order of the experts: token 0 to 0, 1 and 3, token 2 to 1, one to nobody.
    routing = routing_of([0, 1, 1, 3, E], [[0.25] * 4] * 3)._replace(token=jnp.array([0, 2, 0, 0, 1]))
    np.testing.assert_array_equal(chosen_experts(routing), [[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    counts = jax.jit(coactivation_counts)(routing)
    np.testing.assert_array_equal(counts, [[1, 1, 0, 1], [1, 2, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]])
