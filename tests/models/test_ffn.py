"""The dense network against float64, and the patterns that choose a network for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models import AtLayers, Dense, EveryNth, FirstLayers
from dynamoe.moe import LayerPattern, MoE

MOE, DENSE = MoE(), Dense(hidden=8)


def test_dense_by_hand():
    layer = Dense(hidden=1).build(width=1, key=jax.random.key(0))
    for kernel, value in ((layer.gate, 1.0), (layer.up, 3.0), (layer.down, 7.0)):
        kernel[...] = jnp.full((1, 1), value)
    # 7 * silu(1) * 3 = 21 * 0.7310586 = 15.352230.
    y, stats = layer(jnp.ones((1, 1, 1)))
    assert stats is None
    np.testing.assert_allclose(y, [[[15.352230]]], rtol=1e-6)


def test_dense_equals_float64_and_shows_its_input_to_the_tap(reference, key):
    layer, x, seen = DENSE.build(width=16, key=key), jax.random.normal(key, (2, 3, 16)), []
    y, _ = layer(x, tap=lambda *call: seen.append(call))
    np.testing.assert_allclose(y, reference.dense(layer, np.asarray(x, np.float64)), rtol=1e-4, atol=1e-5)
    assert [(path, routing) for path, _, routing in seen] == [("ffn", None)] and seen[0][1] is x
    assert layer(x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (MOE, "MMMMMM"),
        (EveryNth(ffn=MOE, otherwise=DENSE), "DMDMDM"),
        (EveryNth(ffn=MOE, otherwise=DENSE, n=3), "DDMDDM"),
        (EveryNth(ffn=MOE, otherwise=DENSE, n=1), "MMMMMM"),
        (EveryNth(ffn=MOE, otherwise=DENSE, n=4, offset=1), "DMDDDM"),
        (FirstLayers(ffn=MOE, first=DENSE), "DMMMMM"),
        (FirstLayers(ffn=MOE, first=DENSE, count=0), "MMMMMM"),
        (FirstLayers(ffn=MOE, first=DENSE, count=4), "DDDDMM"),
        (AtLayers(ffn=MOE, otherwise=DENSE, layers=(3, 5)), "DDDMDM"),  # V-MoE's last 2 of every second
        (AtLayers(ffn=DENSE, otherwise=MOE, layers=(0,)), "DMMMMM"),
        (FirstLayers(first=DENSE, ffn=EveryNth(ffn=MOE, otherwise=DENSE, offset=0), count=1), "DDMDMD"),
        (EveryNth(ffn=MOE, otherwise=FirstLayers(ffn=MOE, first=DENSE, count=3)), "DMDMMM"),
    ],
)
def test_a_pattern_chooses_by_layer(pattern, layers):
    assert isinstance(pattern, LayerPattern)
    assert "".join("M" if pattern.at(layer) is MOE else "D" for layer in range(6)) == layers
    assert all(pattern.at(layer) in (MOE, DENSE) for layer in range(6))


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match=r"Dense\.hidden is 0; it must be at least 1"):
        Dense(hidden=0)
    with pytest.raises(ValueError, match=r"EveryNth\.n is 0; it must be at least 1"):
        EveryNth(ffn=MOE, n=0)
    with pytest.raises(ValueError, match=r"EveryNth\.offset is 2; with n=2 it must be from 0 to 1"):
        EveryNth(ffn=MOE, offset=2)
    with pytest.raises(ValueError, match=r"AtLayers\.layers holds -1; layers are numbered from 0"):
        AtLayers(ffn=MOE, layers=(2, -1))
    with pytest.raises(ValueError, match=r"FirstLayers\.count is -1; it must be at least 0"):
        FirstLayers(ffn=MOE, count=-1)
