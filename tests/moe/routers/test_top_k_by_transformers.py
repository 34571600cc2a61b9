"""`TopK` against the routers of transformers, recorded by ../fixtures/make_routing_by_transformers.py."""

import importlib.util
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import GroupLimit, LossFree, Sigmoid, TopK
from dynamoe.moe.routing import NO_CONTEXT


def deepseek_v3(**options):
    return TopK(scores=Sigmoid(), balancing=LossFree(), **options)


ROUTERS = {
    "mixtral": TopK(k=2),
    "mixtral top-3 of 5": TopK(k=3),
    "olmoe": TopK(k=8, renormalize=False),
    "olmoe top-1 of 7": TopK(k=1, renormalize=False),
    "olmoe renormalised": TopK(k=4),
    "qwen3": TopK(k=8),
    "qwen3 not renormalised": TopK(k=3, renormalize=False),
    "deepseek v2": TopK(k=6, renormalize=False, scale=16.0, groups=GroupLimit(groups=8, chosen=3, best=1)),
    "deepseek v3": deepseek_v3(k=8, scale=2.5, groups=GroupLimit(groups=8, chosen=4)),
    "deepseek v3 one group of three": deepseek_v3(k=4, groups=GroupLimit(groups=3, chosen=1)),
    "deepseek v3 not renormalised": deepseek_v3(
        k=3, scale=0.7, renormalize=False, groups=GroupLimit(groups=4, chosen=2)
    ),
}


FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURES / "routing_by_transformers.npz") as file:
        return dict(file)


def route(config, x, kernel, bias):
    @jax.jit
    def routing(x):
        router = config.build(width=x.shape[1], experts=kernel.shape[1], key=jax.random.key(0))
        router.gate.kernel[...] = jnp.asarray(kernel)
        if bias is not None:
            router.balancing.bias[...] = jnp.asarray(bias)
        return router(x, NO_CONTEXT)[0]

    return routing(x)


def table(expert, weight, shape):
    """Weights [T, E], 0 where a token does not go."""
    rows = np.zeros(shape)
    rows[np.arange(shape[0])[:, None], np.asarray(expert).reshape(shape[0], -1)] = weight.reshape(shape[0], -1)
    return rows


@pytest.mark.parametrize("name", ROUTERS)
def test_the_published_router_chooses_and_weighs_the_same(name, recorded):
    x, kernel, config = recorded["x"], recorded[f"{name}/kernel"], ROUTERS[name]
    routing = route(config, x, kernel, recorded.get(f"{name}/bias"))
    np.testing.assert_allclose(routing.logits, recorded[f"{name}/logits"], rtol=1e-4, atol=1e-5)
    ours = table(routing.expert, np.asarray(routing.weight), routing.logits.shape)
    theirs = table(recorded[f"{name}/expert"], recorded[f"{name}/weight"], routing.logits.shape)
    assert ((theirs > 0).sum(axis=1) == config.k).all()
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_every_recorded_router_is_tested(recorded):
    assert {name.split("/")[0] for name in recorded} - {"x"} == set(ROUTERS)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra parity: transformers")
def test_what_is_recorded_is_what_transformers_does(recorded):
    found = runpy.run_path(str(FIXTURES / "make_routing_by_transformers.py"))["arrays"]()
    assert set(found) == set(recorded)
    for name, array in found.items():
        np.testing.assert_allclose(array, recorded[name], rtol=1e-5, atol=1e-6, err_msg=name)
