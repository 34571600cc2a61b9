"""What `dynamoe bench moe_layer` computes: layers of which sizes, over which weights and tokens.

Letters: T tokens, D width, F hidden width, E experts, K experts per token, A = T * K assignments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ...kernels.grouped_matmul.cases import CPU_DIVISOR
from ...kernels.grouped_matmul.shapes import MODELS, PHASES
from ...moe import Experts, MoE, SwiGLU, TopK

NAMED = ("OLMoE", "Mixtral-8x7B", "DeepSeek-V3")
"""The models that are measured where none is named and the machine is large enough."""
ALLOWED_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of an output or a gradient, as a part of its largest element."""
CLEAR = 1e-3
"""By how much the last expert that a token chooses is ahead of the next, in the logits: they are sums in float32, in
whatever order."""


class Shape(NamedTuple):
    """Of a layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    chosen: int
    dtype: str = "float32"
    """Of tokens and weights."""
    model: str = ""
    """Whose shape it is, with what tokens and widths are divided by."""

    @property
    def allowed_error(self) -> float:
        return ALLOWED_ERROR[self.dtype]

    @property
    def flops(self) -> float:
        """Of three products with the experts' matrices, their outputs and both gradients."""
        return 18.0 * self.tokens * self.chosen * self.width * self.hidden

    def __str__(self) -> str:
        name = f"{self.model}: " if self.model else ""
        return (
            f"{name}{self.tokens:,} tokens of width {self.width}, {self.experts} experts of hidden width "
            f"{self.hidden}, {self.chosen} per token, {self.dtype}; forward and backward"
        )


OLMOE_LIKE = Shape(tokens=4096, width=512, hidden=256, experts=64, chosen=8)
"""OLMoE's experts and choice at a quarter of its widths: of a size for a CPU."""


class Weights(NamedTuple):
    """Of a layer: router [D, E], gate and up [E, D, F], down [E, F, D]; or their gradients."""

    router: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Problem(NamedTuple):
    """A layer's parameters, its input [1, T, D] and the gradient of its output; the same for all contenders."""

    shape: Shape
    params: nnx.State
    x: jax.Array
    dy: jax.Array

    @property
    def weights(self) -> Weights:
        return weights_in(self.params)


def shapes(model: str | None) -> tuple[Shape, ...]:
    """The named model's; or of none named, what fits the platform.

    On CPU a model's tokens and widths are divided by `CPU_DIVISOR`, as where the kernel alone is measured.
    """
    on_cpu = jax.default_backend() == "cpu"
    if model is None and on_cpu:
        return (OLMOE_LIKE,)
    divisor, dtype = (CPU_DIVISOR, "float32") if on_cpu else (1, "bfloat16")
    return tuple(_model_shape(name, divisor, dtype) for name in (NAMED if model is None else (model,)))


def _model_shape(name: str, divisor: int, dtype: str) -> Shape:
    model = MODELS[name]
    return Shape(
        tokens=PHASES["training"] // divisor,
        width=model.width // divisor,
        hidden=model.hidden // divisor,
        experts=model.experts,
        chosen=model.per_token,
        dtype=dtype,
        model=name if divisor == 1 else f"{name} / {divisor}",
    )


def layer_config(shape: Shape, expert: Experts | None = None) -> MoE:
    """The layer as it is by default, without a loss; OLMoE's router, whatever the model, so that all peers have it."""
    router = TopK(k=shape.chosen, renormalize=False)
    return MoE(experts=shape.experts, router=router, expert=expert or SwiGLU(hidden=shape.hidden), losses=())


def weights_in(params: Any) -> Weights:
    """The arrays in a layer's parameters or in their gradients."""
    experts = (params["experts"][name][...] for name in ("gate", "up", "down"))
    return Weights(params["router"]["gate"]["kernel"][...], *experts)


def draw(shape: Shape) -> Problem:
    """The same numbers every time."""
    params = parameters(layer_config(shape), shape)
    x = _clear_tokens(shape, weights_in(params).router)
    dy = jax.random.normal(jax.random.key(2), x.shape).astype(shape.dtype)
    return Problem(shape, params, x, dy)


def parameters(config: MoE, shape: Shape) -> nnx.State:
    """In the dtype of the tokens. Of DeepSeek-V3 all in float32, which a layer otherwise holds, would fill a GPU."""

    @jax.jit
    def initial(key: jax.Array) -> nnx.State:
        params = nnx.state(config.build(width=shape.width, key=key), nnx.Param)
        return jax.tree.map(lambda array: array.astype(shape.dtype), params)

    return initial(jax.random.key(0))


def _clear_tokens(shape: Shape, gate: jax.Array) -> jax.Array:
    """x [1, T, D] of tokens whose choice no rounding changes: a result with another expert would have to be another."""
    drawn = jax.random.normal(jax.random.key(1), (2 * shape.tokens, shape.width)).astype(shape.dtype)
    logits = jnp.matmul(drawn.astype(jnp.float32), gate.astype(jnp.float32), precision="highest")
    best = jax.lax.top_k(logits, shape.chosen + 1)[0]
    unclear = best[:, shape.chosen - 1] - best[:, shape.chosen] < CLEAR
    return drawn[jnp.argsort(unclear, stable=True)[: shape.tokens]][None]
