"""Attention by hand, against float64 written head by head, and its masks."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention
from dynamoe.models.attention import causal_mask, rotate

B, S, D = 2, 6, 16
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]], np.int32)
CONFIGS = {
    "multi-head": Attention(heads=2),
    "grouped": Attention(heads=4, kv_heads=2, rope_theta=100.0),
    "multi-query with normalised heads": Attention(heads=4, kv_heads=1, head_width=6, qk_norm=True),
}
MASK = causal_mask(jnp.array(SEGMENTS))
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (B, S, D))


def build(config):
    return config.build(width=D, epsilon=1e-5, key=jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def attend(graph, state, x, positions, segments):
    return nnx.merge(graph, state)(x, positions, causal_mask(segments))


def run(layer, x, positions=POSITIONS, segments=SEGMENTS):
    return attend(*nnx.split(layer), x, jnp.array(positions), jnp.array(segments))


@every_config
def test_attention_equals_float64(config, x, reference, randomize):
    layer = randomize(build(config))
    y = run(layer, x)
    for row in range(B):
        expected = reference.attention(layer, np.asarray(x[row], np.float64), POSITIONS[row], SEGMENTS[row])
        np.testing.assert_allclose(y[row], expected, rtol=1e-4, atol=1e-5)


def test_attention_by_blocks_of_queries_is_attention(x):
    # Blocks of 4 leave a tail of 2; gradients of queries, keys and values all pass through the blocks.
    def value_and_gradient(config):
        graph, state = nnx.split(build(config))
        loss = lambda state: jnp.sin(nnx.merge(graph, state)(x, jnp.array(POSITIONS), MASK)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(state)

    whole, blocks = (value_and_gradient(replace(CONFIGS["grouped"], query_block=block)) for block in (None, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, blocks)


def test_scores_by_blocks_never_exist_for_the_whole_sequence():
    x, mask = jnp.zeros((1, 32, D)), jnp.ones((1, 32, 32), bool)
    layer = build(replace(CONFIGS["grouped"], query_block=8))
    traced = jax.make_jaxpr(jax.grad(lambda x: layer(x, jnp.zeros((1, 32), jnp.int32), mask).sum()))(x)
    assert "f32[1,2,2,8,32]" in str(traced) and "f32[1,2,2,32,32]" not in str(traced)


def test_projections_are_normalised_over_all_heads_together(x, randomize):
    layer = randomize(build(Attention(heads=4, kv_heads=2, projection_norm=True)))
    keys, _ = layer.keys_values(x, jnp.zeros((B, S), jnp.int32))  # at position 0 nothing turns
    projected = np.einsum("bsd,dgp->bsgp", x, layer.key[...]).reshape(B, S, -1)
    normed = projected / np.sqrt((projected**2).mean(axis=-1, keepdims=True) + 1e-5) * np.asarray(layer.key_norm.scale)
    np.testing.assert_allclose(keys.reshape(B, S, -1), normed, rtol=1e-4, atol=1e-5)
    assert layer.query_norm.scale.shape == (16,)


def test_attention_by_hand():
    layer = Attention(heads=1, head_width=2).build(width=2, epsilon=1e-5, key=jax.random.key(0))
    for kernel in (layer.query, layer.key, layer.value):
        kernel[...] = jnp.eye(2).reshape(2, 1, 2)
    layer.output[...] = jnp.eye(2).reshape(1, 2, 2)
    # Both tokens at position 0: nothing turns. Token 1 = (0, 2) scores 0 with token 0 = (1, 0) and 4 with itself, both
    # over sqrt(2): weights 1 and e^2.8284271 = 16.918828 over 17.918828, so y = (0.05580722, 2 * 0.9441928).
    x = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    y = run(layer, x, positions=[[0, 0]], segments=[[1, 1]])
    np.testing.assert_allclose(y[0], [[1.0, 0.0], [0.05580722, 1.8883856]], rtol=1e-5)


def test_no_token_sees_a_later_one_or_another_document(x):
    layer = build(CONFIGS["grouped"])
    jacobian = jax.jit(jax.jacrev(lambda x: run(layer, x).sum(axis=-1)))(x)  # [B, S, B, S, D]
    reached = np.abs(jacobian).max(axis=-1) > 0
    for row, other in np.ndindex(B, B):
        same = SEGMENTS[row][:, None] == SEGMENTS[row][None]
        expected = np.tril(same) if row == other else np.zeros((S, S), bool)
        np.testing.assert_array_equal(reached[row, :, other, :], expected)


def test_a_window_ends_what_a_token_sees(x):
    layer = Attention(heads=2, window=3).build(width=D, epsilon=1e-5, key=jax.random.key(1))
    jacobian = jax.jit(jax.jacrev(lambda x: run(layer, x, segments=np.ones((B, S), np.int32)).sum(axis=-1)))(x)
    reached = np.abs(jacobian[0, :, 0]).max(axis=-1) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones((S, S), bool)) & ~np.tril(np.ones((S, S), bool), -3))


def test_causal_mask_by_hand():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(causal_mask(jnp.array([[1, 1, 2, 0]]))[0], np.array(expected, bool))


def test_rotation_by_hand():
    # Width 2 has one frequency, theta^0 = 1: position p turns by p radians. cos 1 = 0.5403023, sin 1 = 0.8414710.
    x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 2, 1, 2))
    turned = rotate(x, jnp.array([[0, 1]]), 10_000.0)[0, :, 0]
    np.testing.assert_allclose(turned, [[1.0, 0.0], [0.5403023, 0.8414710]], rtol=1e-6)


def test_rotation_equals_complex_numbers(reference, key):
    x, positions = jax.random.normal(key, (1, 3, 2, 8)), jnp.array([[0, 5, 1000]])
    turned = rotate(x, positions, 500.0)
    for s, h in np.ndindex(3, 2):
        expected = reference.rope(np.asarray(x[0, s, h], np.float64), int(positions[0, s]), 500.0)
        np.testing.assert_allclose(turned[0, s, h], expected, rtol=1e-3, atol=1e-4)


def test_attention_depends_on_distances_not_positions(x):
    layer = build(CONFIGS["grouped"])
    here, there = (run(layer, x, POSITIONS + shift) for shift in (0, 17))
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_close_to_float32_and_parameters_stay_float32(x):
    layer = build(CONFIGS["grouped"])
    exact = run(layer, x)
    rough = run(layer, x.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16 and layer.query[...].dtype == jnp.float32
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_shape_derives_what_the_config_leaves_open():
    assert Attention(heads=4).shape(32) == (4, 4, 8)
    assert Attention(heads=4, kv_heads=2, head_width=6).shape(10) == (4, 2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, r"Attention\.heads is 0; it must be at least 1"),
        ({"heads": 4, "kv_heads": 3}, r"Attention\.kv_heads is 3; it must divide heads=4"),
        ({"kv_heads": 0}, r"Attention\.kv_heads is 0; it must divide heads=4"),
        ({"head_width": 7}, r"Attention\.head_width is 7; rotary positions need an even width"),
        ({"head_width": 0}, r"Attention\.head_width is 0; rotary"),
        ({"query_block": 0}, r"Attention\.query_block is 0; it must be at least 1, or None"),
        ({"qk_norm": True, "projection_norm": True}, r"qk_norm and projection_norm are both True; at most one"),
        ({"rope_theta": 0.0}, r"Attention\.rope_theta is 0\.0; it must be positive"),
        ({"clip": -1.0}, r"Attention\.clip is -1\.0; it must be positive"),
        ({"scale": float("nan")}, r"Attention\.scale is nan; it must be positive and finite"),
        ({"window": 0}, r"Attention\.window is 0; it must be at least 1"),
        ({"qk_norm": True, "projection_norm": True}, r"qk_norm and projection_norm are both True"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(**arguments)


@pytest.mark.parametrize("width", [10, 12])
def test_a_width_that_does_not_divide_into_even_heads_is_refused(width):
    with pytest.raises(ValueError, match=rf"width is {width}; with Attention\.heads=4 .* must be a multiple of 8"):
        Attention(heads=4).shape(width)
