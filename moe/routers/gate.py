"""The linear map from a token to the logits of its experts, which most routers begin with. Letters as in routing.py."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Gate(nnx.Module):
    """Weights [D, E] of variance 1 / D, perhaps biases [E]; float32 in and out, whatever dtype the activations have."""

    def __init__(self, *, width: int, experts: int, key: jax.Array, bias: bool = False):
        initial = jax.nn.initializers.lecun_normal()(key, (width, experts), jnp.float32)
        self.kernel = nnx.Param(initial, axes=("embed", None))
        self.bias = nnx.Param(jnp.zeros(experts), axes=(None,)) if bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        # "highest": the default precision of a float32 product is bfloat16 on TPUs and TF32 on NVIDIA's cards.
        logits = jnp.matmul(x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision="highest")
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)[None]
