"""Latent attention: what its cache holds, and gradients. tests/models/checkpoints holds it to transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import AttentionAtLayers, Decoder, Dense, LatentAttention
from dynamoe.models.accounting import count_parts

CONFIG = LatentAttention(heads=2, latent_width=6, plain_width=4, rotary_width=2, value_width=3, query_latent_width=5)


def test_a_token_leaves_one_latent_vector_and_one_rotary_key_in_the_cache():
    model = Decoder(vocab=16, width=8, layers=2, attention=CONFIG, ffn=Dense(hidden=8)).build(
        jax.random.key(0), stacked=False
    )
    cache = model.empty_cache(batch=3, slots=5)
    assert cache.layers[0].keys.shape == (3, 1, 5, 2) and cache.layers[0].values.shape == (3, 1, 5, 6)


def test_every_weight_gets_a_gradient_and_no_token_sees_a_later_one(key):
    layer = CONFIG.build(width=8, epsilon=1e-5, key=key)
    graph, state = nnx.split(layer)
    x, positions = jax.random.normal(key, (1, 4, 8)), jnp.arange(4)[None]

    def outputs(state, x):
        return nnx.merge(graph, state)(x, positions, jnp.tril(jnp.ones((1, 4, 4), bool)))

    gradients = jax.jit(jax.grad(lambda state: jnp.square(outputs(state, x)).sum()))(state)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    seen = jax.jit(jax.jacrev(lambda x: outputs(state, x)[0].sum(axis=-1)))(x)[:, 0]
    np.testing.assert_array_equal(np.abs(seen).max(axis=-1) > 0, np.tril(np.ones((4, 4), bool)))


def test_its_parts_are_counted():
    parts = {part.name: part for part in count_parts(Decoder(width=8, layers=1, attention=CONFIG), 10)}
    # Per token: scores 2 * 10 * 2 heads * (4 + 2), values 2 * 10 * 2 * 3.
    assert parts["attention scores"].flops == 240 + 120
    matrices = 8 * 5 + 5 * 2 * (4 + 2) + 8 * (6 + 2) + 6 * 2 * (4 + 3) + 2 * 3 * 8
    assert parts["attention"].parameters == matrices and parts["attention"].flops == 2 * matrices


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentAttention(rotary_width=3), r"LatentAttention\.rotary_width is 3; it must be even"),
        (lambda: LatentAttention(latent_width=0), r"LatentAttention\.latent_width is 0"),
        (lambda: LatentAttention(scale=0.0), r"LatentAttention\.scale is 0\.0"),
        (lambda: AttentionAtLayers(attention=CONFIG, layers=(-1,), otherwise=CONFIG), r"layers holds -1"),
        (lambda: Decoder(residual_scale=0.0), r"Decoder\.residual_scale is 0\.0; it must be positive and finite"),
    ],
)
def test_a_bad_config_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
