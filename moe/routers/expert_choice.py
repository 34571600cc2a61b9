"""Expert choice: experts take tokens instead of tokens taking experts.

Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", https://arxiv.org/abs/2202.09368, section 3.2. Every
expert is equally busy by construction, and the number of experts of a token varies: a token may get many or none.

Letters: T tokens, D width, E experts, G routing groups, N tokens of a group, C tokens per expert and group,
A = G * E * C assignments.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext
from ..routing_groups import check_routing_group, in_groups, real_in_groups
from .gate import Gate

_ROUNDING = 1 - 1e-6
"""Keeps a product that float32 has put a little above a whole number from being rounded up to the next."""


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Each expert takes the C = N * capacity_factor / E tokens of a routing group that score highest with it.

    A token's scores are a softmax over its experts, and weight what the experts return, as in the paper. N counts real
    tokens, so that a padded batch is routed as the same batch without padding.

    Whether a token is taken depends on its rivals, later ones too: in a causal decoder training sees the future, and
    decoding, where the rivals are few, differs from it. The load is even whatever the router does, so a balance loss
    teaches nothing: `MoE(losses=())`.
    """

    capacity_factor: float = 2.0
    """Experts per token on average; the paper uses 2 and 1."""
    routing_group: int | None = None
    """Neighbouring tokens that an expert chooses among; None: the whole batch, of all devices."""

    def __post_init__(self):
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"ExpertChoice.capacity_factor is {self.capacity_factor}; it must be above 0 and finite")
        check_routing_group(self, self.routing_group)

    @property
    def experts_per_token(self) -> float:
        return float(self.capacity_factor)

    @property
    def looks_ahead(self) -> bool:
        return True

    @property
    def depends_on_batch(self) -> bool:
        return True

    def build(self, *, width: int, experts: int, key: jax.Array) -> "ExpertChoiceRouter":
        if self.capacity_factor > experts:
            raise ValueError(
                f"ExpertChoice.capacity_factor is {self.capacity_factor}; with {experts} experts it must be at most "
                f"{experts}, where every expert takes every token"
            )
        return ExpertChoiceRouter(self, width=width, experts=experts, key=key)


class ExpertChoiceRouter(nnx.Module):
    """A linear map to expert logits, a softmax over the experts, a top-C over the tokens."""

    def __init__(self, config: ExpertChoice, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        probs = jax.nn.softmax(logits, axis=-1)
        tokens, experts = probs.shape
        real = real_in_groups(context, tokens, self.config.routing_group)
        scores = jnp.where(real[..., None], in_groups(probs, self.config.routing_group), -1.0)
        groups, size = real.shape
        share = self.config.capacity_factor / experts
        weight, place = jax.lax.top_k(scores.swapaxes(1, 2), math.ceil(size * share * _ROUNDING))  # [G, E, C]

        # A group with padding has fewer places; those past them stay empty, and so do those without a real token.
        places = jnp.ceil(real.sum(axis=1).astype(jnp.float32) * jnp.float32(share * _ROUNDING)).astype(jnp.int32)
        taken = (jnp.arange(place.shape[2])[None, None] < places[:, None, None]) & (weight >= 0)
        token = jnp.arange(groups, dtype=jnp.int32)[:, None, None] * size + place
        expert = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32)[None, :, None], place.shape)

        def flat(values: jax.Array, otherwise: float | int) -> jax.Array:
            return jnp.where(taken, values, jnp.asarray(otherwise, values.dtype)).reshape(-1)

        return Routing(flat(expert, experts), flat(weight, 0.0), flat(token, 0), logits, probs, group=size), None
