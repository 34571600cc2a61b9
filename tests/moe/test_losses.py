"""Auxiliary losses: by hand, against the papers' formulas and against the formula of another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import (
    BalanceLoss,
    EntropyLoss,
    ImportanceLoss,
    Jitter,
    LearnedNoise,
    LoadLoss,
    LossFree,
    MoE,
    PerSequence,
    Probabilities,
    Routing,
    RoutingContext,
    Sigmoid,
    TopK,
    ZLoss,
)
from dynamoe.moe.losses import token_mean
from dynamoe.moe.routing import NO_CONTEXT

E = 4


def routing_of(probs, k, mask=None):
    """Top-k routing of given probabilities."""
    _, expert = jax.lax.top_k(probs, k)
    expert = expert if mask is None else jnp.where(mask[:, None], expert, E)
    return Routing(expert.reshape(-1), jnp.ones(expert.size), None, jnp.log(probs), probs)


def random_probs(tokens=12):
    return jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(5), (tokens, E)))


def switch_by_transformers(probs, k, mask):
    """`load_balancing_loss_func` of transformers' Mixtral, as published: K times the loss per assignment."""
    probs, mask = np.asarray(probs, np.float64), np.asarray(mask, np.float64)
    chosen = np.argsort(-probs, axis=1)[:, :k]
    one_hot = np.eye(E)[chosen]  # [T, K, E]
    tokens_per_expert = (one_hot * mask[:, None, None]).sum(axis=0) / mask.sum()  # [K, E]
    prob_per_expert = (probs * mask[:, None]).sum(axis=0) / mask.sum()  # [E]
    return (tokens_per_expert * prob_per_expert[None]).sum() * E


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_balance_loss_is_transformers_over_k(k):
    probs, mask = random_probs(), jnp.arange(12) % 5 != 2
    np.testing.assert_allclose(
        BalanceLoss()(routing_of(probs, k), NO_CONTEXT), switch_by_transformers(probs, k, np.ones(12)) / k, rtol=1e-5
    )
    np.testing.assert_allclose(
        BalanceLoss()(routing_of(probs, k, mask), RoutingContext(mask=mask)),
        switch_by_transformers(probs, k, mask) / k,
        rtol=1e-5,
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss_is_one_when_balanced_for_every_k(k):
    # Token t prefers experts t, t+1, ... mod E: every expert gets K assignments, and every mean probability is 1/E.
    probs = jnp.stack([jnp.roll(jnp.array([0.4, 0.3, 0.2, 0.1]), t) for t in range(E)])
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, k), NO_CONTEXT), 1.0, rtol=1e-6)


def test_balance_loss_by_hand():
    # Two tokens, K = 1, both to expert 0: f = (1, 0, 0, 0). P_0 = (0.7 + 0.5) / 2 = 0.6. E * f_0 * P_0 = 4 * 0.6 = 2.4.
    probs = jnp.array([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, 1), NO_CONTEXT), 2.4, rtol=1e-6)


def test_balance_loss_is_highest_when_all_tokens_go_to_one_expert():
    probs = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (6, E))
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, 1), NO_CONTEXT), E, rtol=1e-6)


def test_balance_loss_teaches_by_the_probabilities_alone():
    # d/dP of E * sum f P is E * f / T at every token: the counts are constants.
    probs = random_probs()
    gradient = jax.jit(jax.grad(lambda probs: BalanceLoss()(routing_of(probs, 2), NO_CONTEXT)))(probs)
    share = np.bincount(np.argsort(-np.asarray(probs), axis=1)[:, :2].ravel(), minlength=E) / 24
    np.testing.assert_allclose(gradient, np.broadcast_to(E * share / 12, (12, E)), rtol=1e-5)


def test_padding_takes_no_part_in_the_balance_loss():
    probs = random_probs()
    mask = jnp.arange(12) < 8
    padded = BalanceLoss()(routing_of(probs, 2, mask), RoutingContext(mask=mask))
    cut = BalanceLoss()(routing_of(probs[:8], 2), NO_CONTEXT)
    np.testing.assert_allclose(padded, cut, rtol=1e-6)


def test_z_loss_by_hand():
    # Logits (log 1, log 3) and (log 2, log 2): their sums of exponentials are 4 and 4, so the loss is (log 4)^2.
    # With the second token padding it stays; logits scaled by e add 1 to the logarithm.
    logits = jnp.log(jnp.array([[1.0, 3.0], [2.0, 2.0]]))
    routing = Routing(jnp.zeros(2, jnp.int32), jnp.ones(2), None, logits, jax.nn.softmax(logits))
    np.testing.assert_allclose(ZLoss()(routing, NO_CONTEXT), np.log(4) ** 2, rtol=1e-6)
    shifted = routing._replace(logits=logits + jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(
        ZLoss()(shifted, RoutingContext(mask=jnp.array([False, True]))), (np.log(4) + 1) ** 2, rtol=1e-6
    )


def test_token_mean_counts_real_tokens_only():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]])
    np.testing.assert_allclose(token_mean(values, jnp.array([True, True, False])), [2.0, 3.0])
    np.testing.assert_allclose(token_mean(values[:2], None), [2.0, 3.0])
    np.testing.assert_array_equal(token_mean(values, jnp.zeros(3, bool)), [0.0, 0.0])


def pair(probs, weight=None, expert=(0, 1), chance=None):
    """A routing of tokens with one expert each, of two."""
    probs = jnp.array(probs)
    weight = jnp.ones(len(expert)) if weight is None else jnp.array(weight)
    return Routing(jnp.array(expert, jnp.int32), weight, None, jnp.log(probs), probs, chance)


def value(loss, routing, context=NO_CONTEXT):
    return jax.jit(lambda routing: loss(routing, context))(routing)


def test_importance_loss_by_hand():
    routing = pair([[0.7, 0.3], [0.5, 0.5]], weight=[0.7, 0.3])
    # Gates sum to (0.7, 0.3): mean 0.5, variance 0.04, 0.04 / 0.25 = 0.16. Probabilities sum to (1.2, 0.8): mean 1,
    # variance 0.04.
    np.testing.assert_allclose(value(ImportanceLoss(), routing), 0.16, rtol=1e-5)
    np.testing.assert_allclose(value(ImportanceLoss(of=Probabilities()), routing), 0.04, rtol=1e-4)


def test_load_loss_by_hand():
    # The expected loads are (1.0 + 0.5, 0.5 + 0.0): mean 1, variance 0.25. With the second token padding they are
    # (1.0, 0.5): mean 0.75, variance 0.0625, and 0.0625 / 0.5625 = 1 / 9.
    routing = pair([[0.7, 0.3], [0.5, 0.5]], chance=jnp.array([[1.0, 0.5], [0.5, 0.0]]))
    np.testing.assert_allclose(value(LoadLoss(), routing), 0.25, rtol=1e-5)
    mask = jnp.array([True, False])
    np.testing.assert_allclose(value(LoadLoss(), routing, RoutingContext(mask=mask)), 1 / 9, rtol=1e-5)


def test_load_loss_refuses_a_router_without_noise():
    with pytest.raises(ValueError, match=r"LoadLoss needs routing\.chance, and it is None"):
        LoadLoss()(pair([[0.7, 0.3], [0.5, 0.5]]), NO_CONTEXT)
    for router in (TopK(), TopK(noise=Jitter()), TopK(noise=LearnedNoise(), scores=Sigmoid(), balancing=LossFree())):
        with pytest.raises(
            ValueError, match=r"LoadLoss needs .* MoE\.router is TopK.* as TopK\(noise=LearnedNoise\(\)"
        ):
            MoE(router=router, losses=(LoadLoss(),))
    MoE(router=TopK(noise=LearnedNoise()), losses=(LoadLoss(),))


@pytest.mark.parametrize("losses", [BalanceLoss(), (0.01,)])
def test_losses_that_are_no_tuple_of_losses_are_refused(losses, unchecked):
    with pytest.raises(ValueError, match=r"MoE\.losses is .*; it must be a tuple of router losses"):
        MoE(losses=losses)


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf")])
def test_a_coefficient_that_is_not_finite_is_refused(coefficient):
    with pytest.raises(ValueError, match=rf"ZLoss\.coefficient is {coefficient}; it must be finite"):
        MoE(losses=(ZLoss(coefficient=coefficient),))


def test_what_a_loss_holds_at_padding_does_not_count():
    mean = token_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    np.testing.assert_allclose(mean, 2.0)


def test_entropy_loss_by_hand():
    # Sure of each token and even over both: 0 - log 2. Undecided: log 2 - log 2. Sure of one expert for all: 0 - 0.
    sure, undecided, one = [[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5]] * 2, [[1.0, 0.0]] * 2
    for probs, expected in ((sure, -np.log(2)), (undecided, 0.0), (one, 0.0)):
        np.testing.assert_allclose(value(EntropyLoss(), pair(probs)), expected, atol=1e-6)
    np.testing.assert_allclose(value(EntropyLoss(marginal=0.0), pair(undecided)), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(value(EntropyLoss(token=0.0, marginal=2.0), pair(sure)), -2 * np.log(2), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda probs: EntropyLoss()(pair(sure)._replace(probs=probs), NO_CONTEXT)))
    assert np.isfinite(gradient(jnp.array(sure))).all()


def test_entropy_loss_refuses_a_weight_that_is_not_finite():
    with pytest.raises(ValueError, match=r"EntropyLoss\.marginal is inf; it must be finite"):
        EntropyLoss(marginal=float("inf"))


def test_balance_loss_per_sequence_by_hand():
    # Two sequences of two tokens, each all to one expert: f = (1, 0), P_0 = (0.8 + 0.6) / 2 = 0.7, E f P = 1.4; the
    # other is its mirror. Over the batch both experts get half, and the loss is 2 * (0.5 * P_0 + 0.5 * P_1) = 1.
    routing = pair([[0.8, 0.2], [0.6, 0.4], [0.2, 0.8], [0.4, 0.6]], expert=[0, 0, 1, 1])
    context = RoutingContext(sequence_length=2)
    np.testing.assert_allclose(value(BalanceLoss(scope=PerSequence()), routing, context), 1.4, rtol=1e-6)
    np.testing.assert_allclose(value(BalanceLoss(), routing, context), 1.0, rtol=1e-6)


SEQUENCES, LENGTH = 3, 4
PADDED = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool).reshape(-1)


def noisy_routing(spelled_out=False):
    """Two experts of four for each of twelve tokens, with weights and chances; a third of the tokens is padding."""
    probs = random_probs()
    weight, expert = jax.lax.top_k(probs, 2)
    expert = jnp.where(PADDED[:, None], expert, E).reshape(-1)
    weight = jnp.where(PADDED[:, None], weight, 0.0).reshape(-1)
    token, order = None, np.random.default_rng(0).permutation(24)
    if spelled_out:
        expert, weight, token = expert[order], weight[order], jnp.array(order // 2)
    return Routing(expert, weight, token, jnp.log(probs), probs, jnp.sqrt(probs))


def variation(values):
    return values.var() / values.mean() ** 2


def by_the_papers(loss, probs, chance):
    """The loss of one sequence's real tokens, in float64, one token after another."""
    tokens, experts = probs.shape
    count, gates, entropies = np.zeros(experts), np.zeros(experts), 0.0
    for row in probs:
        for e in np.argsort(-row)[:2]:
            count[e] += 1
            gates[e] += row[e]
        entropies -= (row * np.log(row)).sum()
    mean = probs.sum(axis=0) / tokens
    match loss:
        case BalanceLoss():  # DeepSeek-V3, eq. 17-20: f_e = E / (K T) * count
            return (experts / (2 * tokens) * count * mean).sum()
        case ImportanceLoss(of=Probabilities()):
            return variation(mean)
        case ImportanceLoss():
            return variation(gates)
        case LoadLoss():
            return variation(chance.sum(axis=0))
        case EntropyLoss():
            return entropies / tokens + (mean * np.log(mean)).sum()


@pytest.mark.parametrize("spelled_out", [False, True], ids=["token-major", "tokens spelled out"])
@pytest.mark.parametrize(
    "loss", [BalanceLoss, ImportanceLoss, lambda **o: ImportanceLoss(of=Probabilities(), **o), LoadLoss, EntropyLoss]
)
def test_losses_equal_the_papers_over_the_batch_and_by_sequence(loss, spelled_out):
    routing = noisy_routing(spelled_out)
    context = RoutingContext(mask=jnp.array(PADDED), sequence_length=LENGTH)
    probs = np.asarray(routing.probs, np.float64)
    whole, (first, second) = probs[PADDED], (probs[:4], probs[[4, 6]])  # the third sequence is padding, left out
    expected = by_the_papers(loss(), whole, np.sqrt(whole))
    np.testing.assert_allclose(value(loss(), routing, context), expected, rtol=1e-5)
    parts = [by_the_papers(loss(), part, np.sqrt(part)) for part in (first, second)]
    found = value(loss(scope=PerSequence()), routing, context)
    np.testing.assert_allclose(found, np.mean(parts), rtol=1e-5)
    assert abs(found - expected) > 1e-3


def test_padding_alone_costs_nothing_and_its_gradient_is_finite():
    losses = [loss(scope=PerSequence()) for loss in (BalanceLoss, ImportanceLoss, LoadLoss, EntropyLoss)]
    context = RoutingContext(mask=jnp.zeros(12, bool), sequence_length=LENGTH)
    nobody = noisy_routing()._replace(expert=jnp.full(24, E), weight=jnp.zeros(24))

    @jax.jit
    def measure(probs, weight, chance):
        def total(probs, weight, chance):
            routing = nobody._replace(probs=probs, weight=weight, chance=chance)
            return sum(abs(loss(routing, context)) for loss in losses)

        return jax.value_and_grad(total, (0, 1, 2))(probs, weight, chance)

    found, gradients = measure(nobody.probs, nobody.weight, nobody.chance)
    assert found == 0 and all(np.isfinite(gradient).all() for gradient in gradients)


def test_importance_and_load_teach_by_gates_and_chances():
    routing, context = noisy_routing(), RoutingContext(mask=jnp.array(PADDED))

    @jax.jit
    def gradients(weight, chance):
        def total(weight, chance):
            changed = routing._replace(weight=weight, chance=chance)
            return ImportanceLoss()(changed, context) + LoadLoss()(changed, context)

        return jax.grad(total, (0, 1))(weight, chance)

    to_weight, to_chance = gradients(routing.weight, routing.chance)
    np.testing.assert_array_equal(np.abs(to_weight) > 0, np.repeat(PADDED, 2))
    np.testing.assert_array_equal(np.abs(to_chance).max(axis=1) > 0, PADDED)


def test_a_loss_per_sequence_needs_to_know_the_sequences_length():
    with pytest.raises(ValueError, match=r"context\.sequence_length is None; a loss with scope=PerSequence\(\) needs"):
        BalanceLoss(scope=PerSequence())(noisy_routing(), NO_CONTEXT)
