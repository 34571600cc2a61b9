"""Experts with packed weights do what they would with the numbers that the packed weights stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.kernels.quantized import INT4, dequantize
from dynamoe.moe import (
    GELU,
    DenseDispatcher,
    GatedShared,
    MoE,
    QuantizedWeight,
    SwiGLU,
    TopK,
    quantize_experts,
)

E, C, D, F = 3, 2, 8, 12
SIZES = jnp.array([2, 0, 4], jnp.int32)
CONFIGS = {  # the plainest product: what a packed one must equal is tested in tests/kernels
    "SwiGLU": SwiGLU(hidden=F, implementation="reference"),
    "GELU": GELU(hidden=F, implementation="reference"),
    "gated": GatedShared(expert=SwiGLU(hidden=F, implementation="reference")),
}


def unpacked(packed):
    """The same experts with the numbers that their packed weights stand for."""
    copy = nnx.clone(packed)
    owner = copy.expert if hasattr(copy, "expert") else copy
    for name in ("gate", "up", "down"):
        if isinstance(getattr(owner, name, None), QuantizedWeight):
            setattr(owner, name, nnx.Param(dequantize(getattr(owner, name)[...])))
    return copy


@pytest.fixture(scope="module")
def built():
    """Experts by configuration, and the same packed."""
    cache = {}

    def get(name):
        if name not in cache:
            experts = CONFIGS[name].build(experts=E, width=D, key=jax.random.key(1))
            cache[name] = experts, quantize_experts(experts, INT4, group_size=4)
        return cache[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_experts_equal_the_numbers_that_they_stand_for(name, key, built):
    _, packed = built(name)
    forms = (((6, D), SIZES), ((E, C, D), None), ((1, C, D), None))  # sorted, equal batches, one batch that all share
    inputs = [(jax.random.normal(key, shape), sizes) for shape, sizes in forms]

    def run(experts):
        graph, state = nnx.split(experts)

        return jax.jit(lambda state: [nnx.merge(graph, state)(*each) for each in inputs])(state)

    for found, expected in zip(jax.tree.leaves(run(packed)), jax.tree.leaves(run(unpacked(packed))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(found).max() > 1e-3


def test_gradients_reach_the_rows_of_packed_experts(key, built):
    graph, state = nnx.split(built("GELU")[1])
    rows = jax.random.normal(key, (1, C, D))
    gradient = jax.jit(jax.grad(lambda rows, state: nnx.merge(graph, state)(rows, None).sum()))(rows, state)
    assert np.abs(gradient).min() > 0


def test_packing_leaves_the_given_experts_alone_and_takes_the_weights_from_the_optimizer(built):
    experts, packed = built("gated")
    assert isinstance(experts.expert.gate, nnx.Param)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(packed, nnx.Param))] == [("gate",)]
    weight = packed.expert.down
    assert weight.get_metadata()["axes"] == ("expert", "mlp", "embed") and weight[...].shape == (E, F, D)
    # 4 bits a number, and a scale of 32 bits for each 4 of them.
    assert weight[...].bits_per_element == 4 + 32 / 4


def test_a_layer_runs_with_packed_experts_in_either_dtype(built):
    layer = MoE(experts=E, router=TopK(k=2), expert=CONFIGS["SwiGLU"], dispatcher=DenseDispatcher()).build(
        width=D, key=jax.random.key(1)
    )
    layer.experts = built("SwiGLU")[1]
    graph, state = nnx.split(layer)
    for dtype in (jnp.float32, jnp.bfloat16):
        y, _ = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((6, D), dtype))
        assert (y.shape, y.dtype) == ((6, D), dtype)


def test_stacked_packed_experts_are_scanned_layer_by_layer(key, built):
    experts, packed = built("GELU")
    graph, state = nnx.split(experts)
    stacked = nnx.merge(graph, jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state))
    packed_graph, of_layers = nnx.split(quantize_experts(stacked, INT4, group_size=4))

    @jax.jit
    def scanned(of_layers, rows):
        return jax.lax.scan(lambda x, state: (x, nnx.merge(packed_graph, state)(x, SIZES)), rows, of_layers)[1]

    found = scanned(of_layers, jax.random.normal(key, (6, D)))
    np.testing.assert_allclose(found[0], packed(jax.random.normal(key, (6, D)), SIZES), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(of_layers["up"].get_value()[1].codes, packed.up[...].codes)
    assert np.abs(found[1] - found[0]).max() > 0.1


def test_a_weight_that_does_not_divide_into_groups_is_refused_by_name(built):
    with pytest.raises(ValueError, match=r"experts\.expert\.down: group_size is 8; it must divide D, .* which is 12"):
        quantize_experts(built("gated")[0], INT4, group_size=8)


def test_experts_without_matrices_are_refused():
    with pytest.raises(ValueError, match=r"experts is a List without a parameter that has the axes 'embed' and 'mlp'"):
        quantize_experts(nnx.List([]), INT4)
