"""Dropless dispatch inside the experts' products: the same numbers as with every expert on every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import (
    GELU,
    ClampedSwiGLU,
    DenseDispatcher,
    Dispatcher,
    Experts,
    FusedDispatcher,
    MoE,
    MoELayer,
    NullExperts,
    RoutingContext,
    SwiGLU,
    TopK,
)

WIDTH, EXPERTS = 8, 4


def built(dispatcher: Dispatcher, expert: Experts, **options) -> MoELayer:
    config = MoE(experts=EXPERTS, router=TopK(k=2), expert=expert, dispatcher=dispatcher)
    return dataclasses.replace(config, **options).build(width=WIDTH, key=jax.random.key(0))


def value_and_gradients(layer: MoELayer, mask: jax.Array | None = None) -> list[jax.Array]:
    x, dy = (jax.random.normal(jax.random.key(seed), (3, 5, WIDTH)) for seed in (1, 2))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(params: nnx.State, x: jax.Array) -> jax.Array:
        y, stats = nnx.merge(graph, params, rest)(x, RoutingContext(mask=mask))
        return (y * dy).sum() + stats.loss

    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1)))(params, x)
    return [value, *jax.tree.leaves(gradients)]


def assert_same(expert: Experts, mask: jax.Array | None = None, **options) -> None:
    found, expected = (
        value_and_gradients(built(dispatcher, expert, **options), mask)
        for dispatcher in (FusedDispatcher(), DenseDispatcher())
    )
    assert len(found) == len(expected) > 4
    for ours, oracle in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("expert", [SwiGLU(hidden=6), GELU(hidden=6)], ids=lambda expert: type(expert).__name__)
def test_it_is_every_expert_on_every_token(expert):
    assert_same(expert)


def test_padding_and_tokens_without_an_expert_are_nobodys():
    assert_same(SwiGLU(hidden=6), mask=jnp.arange(15) < 11)
    assert_same(SwiGLU(hidden=6), router=NullExperts(k=2), losses=())


def test_experts_that_take_no_tokens_are_named():
    layer = built(FusedDispatcher(), ClampedSwiGLU(hidden=6))
    with pytest.raises(ValueError, match="experts are ClampedSwiGLUExperts; FusedDispatcher needs such with a method"):
        value_and_gradients(layer)


def test_an_implementation_of_the_experts_products_is_refused():
    layer = built(FusedDispatcher(), SwiGLU(hidden=6, implementation="xla"))
    with pytest.raises(ValueError, match="the experts' implementation is 'xla'; with FusedDispatcher it is none"):
        value_and_gradients(layer)


def test_an_implementation_of_the_moves_is_asked_for_by_name():
    with pytest.raises(NotImplementedError, match="triton is for GPUs; the platform is cpu"):
        value_and_gradients(built(FusedDispatcher(implementation="triton"), SwiGLU(hidden=6)))
