"""Attention block by block: equal to attention over all slots at once, whatever the blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models import cached_attention as module
from dynamoe.models.cache import LayerCache
from dynamoe.models.cached_attention import cached_attention

B, S, SLOTS, H, G, P, W = 2, 3, 11, 4, 2, 4, 6


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def cache():
    valid = np.random.default_rng(1).random((B, SLOTS)) < 0.8
    valid[:, 0] = True
    keys, values = numbers(B, G, SLOTS, P, seed=1), numbers(B, G, SLOTS, W, seed=2)
    return LayerCache(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(valid))


QUERY = numbers(B, S, H, P, seed=3)
POSITIONS = np.array([[3, 4, 5], [8, 9, 10]])
MASK = np.array([[True, True, True], [True, True, False]])


def at_once(cache, *, scale, window, sinks):
    """In float64, one query head at a time."""
    result = np.zeros((B, S, H, W))
    for b, s, h in np.ndindex(B, S, H):
        if not MASK[b, s]:
            continue
        slots = np.arange(SLOTS)
        seen = np.asarray(cache.valid[b]) & (slots <= POSITIONS[b, s]) & (slots > POSITIONS[b, s] - window)
        g = h // (H // G)
        scores = scale * np.asarray(cache.keys[b, g, seen], np.float64) @ QUERY[b, s, h]
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h]))
        result[b, s, h] = weights @ np.asarray(cache.values[b, g, seen], np.float64) / total
    return result


# 11 slots: one block, blocks of which the last begins early, and blocks of one slot.
@pytest.mark.parametrize(("block", "tile"), [(256, 128), (4, 1), (4, 3), (1, 3)])
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (3, False), (None, True), (4, True)])
def test_blocks_of_any_size_give_the_softmax_over_all(cache, monkeypatch, block, tile, window, with_sinks):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "TILE", tile)
    sinks = numbers(H, seed=4) if with_sinks else None
    run = jax.jit(functools.partial(cached_attention, window=window, scale=0.7))
    found = run(QUERY, cache, POSITIONS, MASK, sinks=sinks)
    expected = at_once(cache, scale=0.7, window=window or SLOTS, sinks=sinks)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_is_the_same_to_the_bit_beside_a_longer_one(cache, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    run = jax.jit(cached_attention)
    beside = run(QUERY, cache, POSITIONS, MASK)
    short = run(QUERY, cache, np.array([[3, 4, 5], [0, 1, 2]]), MASK)
    np.testing.assert_array_equal(short[0], beside[0])


def test_one_row_is_read_and_written_where_it_lies(cache):
    new = (numbers(1, S, G, P, seed=5), numbers(1, S, G, W, seed=6), np.array([[3, 4, 5]]), MASK[:1])
    one = cache._replace(row=jnp.asarray(1)).write(*(jnp.asarray(array) for array in new))
    all_rows = cache.write(*(jnp.asarray(np.repeat(array, 2, axis=0)) for array in new))
    positions = new[2]
    for name in ("keys", "values", "valid"):
        found = getattr(one, name)
        np.testing.assert_array_equal(found[0], getattr(cache, name)[0])
        np.testing.assert_array_equal(found[1], getattr(all_rows, name)[1])
    run = jax.jit(cached_attention)
    alone = run(QUERY[1:], one, positions, MASK[:1])
    np.testing.assert_allclose(alone, run(QUERY, all_rows, np.repeat(positions, 2, 0), MASK[[0, 0]])[1:], rtol=1e-6)


def test_bfloat16_is_close_to_float32(cache):
    rough = LayerCache(cache.keys.astype(jnp.bfloat16), cache.values.astype(jnp.bfloat16), cache.valid)
    found = cached_attention(jnp.asarray(QUERY, jnp.bfloat16), rough, jnp.asarray(POSITIONS), jnp.asarray(MASK))
    assert found.dtype == jnp.bfloat16
    expected = at_once(cache, scale=P**-0.5, window=SLOTS, sinks=None)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05)
