"""The layer inside a model of Flax Linen, through Flax's own bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx import bridge

from dynamoe.moe import DenseDispatcher, MoE, SwiGLU, TopK

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
