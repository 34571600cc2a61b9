"""Random routing: the control that a learned router has to beat."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, RouterState, Routing, RoutingContext, check_choices, padding_to_nobody


@dataclass(frozen=True, kw_only=True)
class Random(Router):
    """Each token goes to k different experts, drawn uniformly whatever the token is; each weighs 1 / k.

    With `context.key`, as in training, the draw is new in every step. Without one, as in evaluation, it follows from a
    seed that the router drew when it was built and from the token's place in the call, so that an evaluation can be
    repeated. Decoding with a cache knows no place but that in its own call: there a token may be sent elsewhere than a
    forward pass over the whole text would send it.
    """

    k: int = 2
    """Experts per token."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"Random.k is {self.k}; it must be at least 1 expert per token")

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def depends_on_batch(self) -> bool:
        return True

    @property
    def weight_sum(self) -> float | None:
        return 1.0

    def build(self, *, width: int, experts: int, key: jax.Array) -> "RandomRouter":
        check_choices(self, experts, "k")
        return RandomRouter(self, experts=experts, key=key)


class RandomRouter(nnx.Module):
    """No parameters; a seed of its own."""

    def __init__(self, config: Random, *, experts: int, key: jax.Array):
        self.config = config
        self.experts = experts
        self.seed = RouterState(jax.random.bits(key, (), jnp.uint32), axes=())

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        shape, k = (x.shape[0], self.experts), self.config.k
        key = jax.random.key(self.seed[...]) if context.key is None else context.key
        # The k largest of independent uniform numbers are k experts without replacement, all sets equally probable.
        _, expert = jax.lax.top_k(jax.random.uniform(key, shape), k)
        weight = jnp.full(expert.shape, 1.0 / k)
        expert, weight = padding_to_nobody(expert, weight, context.mask, self.experts)
        nothing = jnp.zeros(shape, jnp.float32)
        return Routing(expert.reshape(-1), weight.reshape(-1), None, nothing, nothing + 1.0 / self.experts), None
