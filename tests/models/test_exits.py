"""A decoder with exits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Exits, LayerDropout, OwnHead, OwnNorm, SharedHead
from dynamoe.models import Attention, Decoder, Dense, NewTokens, with_layers
from dynamoe.moe import DenseDispatcher, MoE, SwiGLU, TopK

CONFIG = Decoder(
    vocab=30, width=16, layers=4, attention=Attention(heads=2), ffn=Dense(hidden=16), exits=Exits(after=(1, 3))
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 7)))


def shallow(model, depth):
    """The first layers alone."""
    config = dataclasses.replace(model.config, layers=depth, exits=None)
    short = config.build(jax.random.key(1), stacked=False)
    short.embedding, short.segments = model.embedding, model.segments[:depth]
    return short


@pytest.mark.parametrize("stacked", [True, False])
def test_what_enters_an_exit_is_the_model_of_so_many_layers(stacked) -> None:
    model = CONFIG.build(jax.random.key(0), stacked=stacked)
    hidden = model.hidden(TOKENS)
    layers = with_layers(model, stacked=False)
    assert len(hidden.exits) == 2
    for exit, depth in enumerate((1, 3)):
        np.testing.assert_allclose(hidden.exits[exit], shallow(layers, depth).hidden(TOKENS).x, atol=1e-5)
    np.testing.assert_allclose(hidden.x, layers.hidden(TOKENS).x, atol=1e-5)


@pytest.mark.parametrize("head", [SharedHead(), OwnNorm(), OwnHead()])
def test_heads_own_what_they_say(head) -> None:
    model = dataclasses.replace(CONFIG, exits=Exits(after=(1, 3), head=head)).build(jax.random.key(0), stacked=False)
    x = jax.random.normal(jax.random.key(2), (1, 2, 16))
    normed = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    kernel = model.exit_heads[1].kernel[...] if head.own_kernel else model.head_kernel[...]
    assert (model.exit_heads[1].norm is not None) == head.own_norm
    np.testing.assert_allclose(model.head(x, 1), normed @ kernel, atol=1e-5)
    np.testing.assert_array_equal(model.head(x, 2), model.head(x))


def test_layer_dropout_leaves_out_rows_in_training_alone() -> None:
    dropout = LayerDropout(most=0.999999, from_scratch=False)
    model = dataclasses.replace(CONFIG, layer_dropout=dropout).build(jax.random.key(0), stacked=False)
    plain = model.hidden(TOKENS).x
    key = jax.random.key(5)
    assert np.array_equal(model.hidden(TOKENS, key=key).x, plain)
    dropped = model.hidden(TOKENS, key=key, training=True)
    assert not np.array_equal(dropped.x, plain)
    np.testing.assert_array_equal(dropped.x, dropped.exits[1])  # the last layer never runs
    np.testing.assert_allclose(dropped.exits[0], model.hidden(TOKENS).exits[0], atol=1e-6)  # the first one always


@pytest.mark.parametrize("ffn", [Dense(hidden=16), MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8))])
def test_layers_from_one_to_another_are_the_whole(ffn) -> None:
    model = dataclasses.replace(CONFIG, ffn=ffn).build(jax.random.key(0), stacked=False)
    cache = model.empty_cache(batch=2, slots=8)
    expected, whole = model.extend(TOKENS, cache)
    new = NewTokens(TOKENS, jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.ones((2, 7), bool))
    x, first = model.decode_layers(model.embed(TOKENS), new, cache.layers[:3], first=0)
    x, second = model.decode_layers(x, new, cache.layers[3:], first=3)
    np.testing.assert_allclose(x, expected, atol=1e-5)
    for found, wanted in zip((*first, *second), whole.layers, strict=True):
        np.testing.assert_allclose(found.keys, wanted.keys, atol=1e-5)


def test_remembered_layers_hold_keys_and_values_of_the_state() -> None:
    model = CONFIG.build(jax.random.key(0), stacked=False)
    x = jax.random.normal(jax.random.key(2), (2, 7, 16))
    new = NewTokens(TOKENS, jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.ones((2, 7), bool))
    empty = model.empty_cache(batch=2, slots=8).layers
    remembered = model.remember_layers(x, new, empty[2:], first=2)
    _, run = model.decode_layers(x, new, empty[2:3], first=2)
    np.testing.assert_allclose(remembered[0].keys, run[0].keys, atol=1e-6)
    np.testing.assert_allclose(remembered[0].values, run[0].values, atol=1e-6)
    assert np.asarray(remembered[1].valid)[:, :7].all()


def test_a_mixture_trains_its_exits_through_dense_dispatch() -> None:
    moe = MoE(experts=4, expert=SwiGLU(hidden=8), dispatcher=DenseDispatcher())
    model = dataclasses.replace(CONFIG, ffn=moe).build(jax.random.key(0))
    hidden = model.hidden(TOKENS, key=jax.random.key(1), training=True)
    assert len(hidden.stats) == 4 and len(hidden.exits) == 2
