"""The likelihood of targets, whole and by blocks, against SciPy's own softmax."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special
from flax import nnx

from dynamoe.models import Attention, Decoder, Dense, negative_log_likelihood

V, B, S = 40, 2, 7
CONFIG = Decoder(vocab=V, width=16, layers=1, attention=Attention(heads=2), ffn=Dense(hidden=8), loss_block=3)
X = jax.random.normal(jax.random.key(0), (B, S, 16))
TARGETS = jax.random.randint(jax.random.key(1), (B, S), 0, V)


def build(loss_block):
    return dataclasses.replace(CONFIG, loss_block=loss_block).build(jax.random.key(2))


@pytest.mark.parametrize("loss_block", [None, 3, 7])
def test_nats_are_those_of_the_softmax_over_the_logits(loss_block):
    model = build(loss_block)
    graph, state = nnx.split(model)
    nats = jax.jit(lambda state: negative_log_likelihood(nnx.merge(graph, state), X, TARGETS))(state)
    probabilities = scipy.special.softmax(np.asarray(model.head(X), np.float64), axis=-1)
    expected = -np.log(np.take_along_axis(probabilities, np.asarray(TARGETS)[..., None], axis=-1))[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_gradients_by_blocks_are_those_of_the_whole():
    def gradients(loss_block):
        graph, state = nnx.split(build(loss_block))
        loss = lambda state, x: negative_log_likelihood(nnx.merge(graph, state), x, TARGETS).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(state, X)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(None), gradients(3))


def test_logits_by_blocks_never_exist_for_the_whole_sequence():
    graph, state = nnx.split(build(3))
    traced = jax.make_jaxpr(jax.grad(lambda state: negative_log_likelihood(nnx.merge(graph, state), X, TARGETS).sum()))(
        state
    )
    assert f"f32[{B},3,{V}]" in str(traced) and f"f32[{B},{S},{V}]" not in str(traced)
    # a jaxpr's text says nothing of what it does not hold: the whole loss has it
    graph, state = nnx.split(build(None))
    whole = jax.make_jaxpr(lambda state: negative_log_likelihood(nnx.merge(graph, state), X, TARGETS))(state)
    assert f"f32[{B},{S},{V}]" in str(whole)
