"""The layer inside a model of Flax Linen, through Flax's own bridge."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import bridge

from dynamoe.moe import DenseDispatcher, MoE, Router, RouterState, Routing, RoutingContext, SwiGLU, TopK

CONFIG = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher())


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, stats = bridge.to_linen(lambda rngs: CONFIG.build(width=8, key=rngs.params()), name="moe")(x)
        return nn.Dense(3)(x + y), stats.loss


def test_a_linen_model_trains_the_layers_parameters(key):
    model, x = Classifier(), jax.random.normal(key, (6, 8))
    variables = model.init(key, x)

    def loss(variables):
        logits, auxiliary = model.apply(variables, x)
        return jnp.square(logits).sum() + auxiliary

    gradients = jax.jit(jax.grad(loss))(variables)["params"]["moe"]
    names = {jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in jax.tree.leaves_with_path(gradients)}
    assert len(names) == 4 and min(names.values()) > 1e-5, names


@dataclass(frozen=True, kw_only=True)
class Turns(Router):
    """All tokens of a call go to one expert; the next one's turn is what the router remembers."""

    experts_per_token = 1.0

    def build(self, *, width, experts, key):
        return TurnsRouter(experts)


class TurnsRouter(nnx.Module):
    def __init__(self, experts):
        self.turn = RouterState(jnp.zeros((), jnp.int32))
        self.experts = experts

    def __call__(self, x, context):
        expert = jnp.broadcast_to(self.turn[...], x.shape[:1])
        probs = jax.nn.one_hot(expert, self.experts)
        turn = {"turn": (self.turn[...] + 1) % self.experts} if context.training else None
        return Routing(expert, jnp.ones(x.shape[0]), None, probs, probs), turn


STATEFUL = MoE(experts=4, router=Turns(), expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher())


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        layer = bridge.to_linen(lambda rngs: STATEFUL.build(width=8, key=rngs.params()), name="moe")
        y, stats = layer(x, RoutingContext(training=training))
        if stats.router_state:
            layer(stats.router_state, nnx_method="update_router_state")
        return y, stats.load


def test_a_linen_model_keeps_a_routers_state_beside_its_parameters(key):
    model, x = Stateful(), jax.random.normal(key, (6, 8))
    variables = model.init(key, x)
    (collection,) = [name for name in variables if name != "params"]
    for expert in (0, 1, 2):
        (_, load), changed = model.apply(variables, x, training=True, mutable=[collection])
        assert load.argmax() == expert and load.max() == 1
        variables = {**variables, **changed}
    y, load = model.apply(variables, x)
    assert load.argmax() == 3 and model.apply(variables, x)[1].argmax() == 3
    assert y.shape == x.shape
