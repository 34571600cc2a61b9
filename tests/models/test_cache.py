"""The key-value cache: what is written where, and that attention sees valid slots alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention
from dynamoe.models.attention import causal_mask
from dynamoe.models.cache import empty_cache

D, SLOTS = 16, 8


@pytest.fixture
def cache():
    return empty_cache(layers=2, batch=2, slots=SLOTS, kv_heads=2, head_width=4, dtype=jnp.dtype("float32"))


def test_an_empty_cache_holds_nothing_in_buffers_of_its_own(cache):
    assert cache.slots == SLOTS and len(cache.layers) == 2
    assert not any(layer.valid.any() for layer in cache.layers)
    np.testing.assert_array_equal(cache.length, [0, 0])
    leaves = jax.tree.leaves(cache)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_a_token_lands_in_the_slot_of_its_position(cache):
    keys = jnp.arange(2 * 2 * 2 * 4, dtype=jnp.float32).reshape(2, 2, 2, 4) + 1
    positions, mask = jnp.array([[0, 1], [3, 4]]), jnp.array([[True, True], [True, False]])
    written = cache.layers[0].write(keys, -keys, positions, mask)
    np.testing.assert_array_equal(written.keys[0, :, :2].swapaxes(0, 1), keys[0])
    np.testing.assert_array_equal(written.keys[1, :, 3:5].swapaxes(0, 1), keys[1])
    np.testing.assert_array_equal(written.values, -written.keys)
    valid = np.zeros((2, SLOTS), bool)
    valid[0, :2], valid[1, 3] = True, True
    np.testing.assert_array_equal(written.valid, valid)
    assert np.count_nonzero(written.keys) == keys.size


def test_a_token_past_the_last_slot_is_dropped(cache):
    ones = jnp.ones((2, 2, 2, 4))
    written = cache.layers[0].write(ones, ones, jnp.array([[7, 8], [20, 21]]), jnp.ones((2, 2), bool))
    assert written.valid.sum() == 1 and written.valid[0, 7]
    assert np.count_nonzero(written.keys) == 2 * 4


def test_a_row_that_begins_anew_forgets_what_it_held_and_leaves_others_alone(cache):
    """Also where a layer will not run for a token of the new one, and so will not write over it."""
    full = cache._replace(layers=tuple(layer._replace(valid=jnp.ones((2, SLOTS), bool)) for layer in cache.layers))
    anew = full.of_row(jnp.asarray(1), jnp.zeros(1, jnp.int32)).of_all(cache.length)
    on = full.of_row(jnp.asarray(1), jnp.ones(1, jnp.int32)).of_all(cache.length)
    both = full.of_row(None, jnp.array([0, 3])).of_all(cache.length)
    for found, expected in ((anew, [True, False]), (on, [True, True]), (both, [False, True])):
        for layer in found.layers:
            assert layer.row is None
            np.testing.assert_array_equal(layer.valid, np.repeat(np.array(expected)[:, None], SLOTS, axis=1))


def test_values_are_stored_in_the_dtype_of_the_cache():
    cache = empty_cache(layers=1, batch=1, slots=4, kv_heads=1, head_width=2, dtype=jnp.dtype("bfloat16"))
    ones = jnp.ones((1, 1, 1, 2))
    assert cache.layers[0].write(ones, ones, jnp.array([[0]]), jnp.array([[True]])).keys.dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def attention():
    return Attention(heads=4, kv_heads=2).build(width=D, epsilon=1e-5, key=jax.random.key(1))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 6, D))


@functools.partial(jax.jit, static_argnums=0)
def jitted(graph, state, *arguments):
    return nnx.merge(graph, state).decode(*arguments)


def decode(attention, *arguments):
    return jitted(*nnx.split(attention), *arguments)


@functools.partial(jax.jit, static_argnums=0)
def whole_rows(graph, state, x):
    """Attention over rows of one document each."""
    ones = jnp.ones(x.shape[:2], jnp.int32)
    return nnx.merge(graph, state)(x, jnp.cumsum(ones, axis=1) - 1, causal_mask(ones))


def everywhere(length):
    return jnp.broadcast_to(jnp.arange(length), (2, length)), jnp.ones((2, length), bool)


def test_decoding_in_two_pieces_equals_attention_at_once(attention, cache, x):
    positions, mask = everywhere(6)
    whole = whole_rows(*nnx.split(attention), x)
    first, layer = decode(attention, x[:, :4], positions[:, :4], mask[:, :4], cache.layers[0])
    second, _ = decode(attention, x[:, 4:], positions[:, 4:], mask[:, 4:], layer)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-4, atol=1e-5)


def test_an_invalid_slot_is_not_seen_in_the_row_and_layer_that_lack_it(attention, cache, x, reference):
    positions, mask = everywhere(5)
    _, layer = decode(attention, x[:, :5], positions, mask, cache.layers[0])
    # Row 0 never ran this layer for token 2; what its slot holds must not matter.
    keys, values = (array.at[0, :, 2].set(9.0) for array in (layer.keys, layer.values))
    layer = layer._replace(valid=layer.valid.at[0, 2].set(False), keys=keys, values=values)
    last, _ = decode(attention, x[:, 5:], jnp.full((2, 1), 5), jnp.ones((2, 1), bool), layer)
    # To the oracle, token 2 of row 0 belongs to another document.
    for row, segments in enumerate([np.array([1, 1, 2, 1, 1, 1]), np.ones(6, int)]):
        expected = reference.attention(attention, np.asarray(x[row], np.float64), np.arange(6), segments)[5]
        np.testing.assert_allclose(last[row, 0], expected, rtol=1e-4, atol=1e-5)


def test_padding_of_a_prompt_leaves_nothing_behind(attention, cache, x):
    positions, mask = everywhere(4)
    short = mask.at[0, 2:].set(False)
    _, layer = decode(attention, x[:, :4], positions, short, cache.layers[0])
    np.testing.assert_array_equal(layer.valid[:, :5], [[True, True, False, False, False], [True] * 4 + [False]])
    # Row 0 goes on at position 2, over what its padding wrote.
    last, _ = decode(attention, x[:, 4:5], jnp.array([[2], [4]]), jnp.ones((2, 1), bool), layer)
    joined = jnp.concatenate([x[:1, :2], x[:1, 4:5]], axis=1)
    whole = whole_rows(*nnx.split(attention), joined)
    np.testing.assert_allclose(last[0, 0], whole[0, 2], rtol=1e-4, atol=1e-5)
