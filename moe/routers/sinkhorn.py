"""Sinkhorn routing: logits are balanced over the experts before a token chooses.

Clark et al. 2022, "Unified Scaling Laws for Routed Language Models", https://arxiv.org/abs/2202.01169, "S-BASE", a soft
form of the balanced assignment of Lewis et al. 2021 (see base.py); the iteration is Sinkhorn's, Cuturi 2013,
https://arxiv.org/abs/1306.0895.

Letters: T tokens, D width, E experts, K experts per token, G routing groups, N tokens of a group.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..routing import Router, Routing, RoutingContext, check_choices, padding_to_nobody
from ..routing_groups import check_routing_group, in_groups, real_in_groups
from ..scores import Scores, Sigmoid
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Router):
    """In training a token goes to the k experts that are largest in a balanced matrix; else to its k largest logits.

    exp(logits) is scaled alternately by rows, so that every token gives 1, and by columns, so that every expert gets
    an even share of its routing group. That only chooses; the weights are the scores of the raw logits, through which
    the router learns. The largest entries of a balanced matrix are not quite balanced themselves: the load is near
    even, not even, and a capacity still drops.

    In training a token's expert depends on later tokens; at inference it does not, and the load is what the logits
    make it. `looks_ahead` is True for the sake of training.
    """

    k: int = 1
    """Experts per token; the paper's is 1."""
    iterations: int = 8
    """How often rows and columns are scaled. The paper iterates until the change is small; here the number is fixed, so
    that the compiled program is one loop of known length."""
    scores: Scores = Sigmoid()
    """What the logits become as weights."""
    routing_group: int | None = None
    """Neighbouring tokens that are balanced among each other; None: the whole batch, of all devices."""

    def __post_init__(self):
        for name in ("k", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"Sinkhorn.{name} is {getattr(self, name)}; it must be at least 1")
        check_routing_group(self, self.routing_group)

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def looks_ahead(self) -> bool:
        return True

    def build(self, *, width: int, experts: int, key: jax.Array) -> "SinkhornRouter":
        check_choices(self, experts, "k")
        return SinkhornRouter(self, width=width, experts=experts, key=key)


class SinkhornRouter(nnx.Module):
    """A linear map to expert logits, the balancing of them in training, and a top-k."""

    def __init__(self, config: Sinkhorn, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        (tokens, experts), group = logits.shape, self.config.routing_group
        scores, probs = self.config.scores(logits)
        preference = jax.lax.stop_gradient(logits)
        if context.training:
            grouped, real = in_groups(preference, group), real_in_groups(context, tokens, group)
            grouped += balancing_bias(grouped, real, self.config.iterations)[:, None]
            preference = grouped.reshape(-1, experts)[:tokens]
        _, expert = jax.lax.top_k(preference, self.config.k)
        weight = jnp.take_along_axis(scores, expert, axis=1)
        expert, weight = padding_to_nobody(expert, weight, context.mask, experts)
        return Routing(expert.reshape(-1), weight.reshape(-1), None, logits, probs), None


# Compiled as one, so that a call outside of jit does not compile its loop anew.
@functools.partial(jax.jit, static_argnames="iterations")
def balancing_bias(logits: Float[Array, "G N E"], real: Bool[Array, "G N"], iterations: int) -> Float[Array, "G E"]:
    """What to add to each expert's logits so that their exponentials are balanced, by Sinkhorn's iteration.

    Scaling rows and columns of exp(logits) is adding a number per token and one per expert to the logits. A token's
    number does not change which of its experts is largest, so only those of the experts are returned. In logarithms:
    an exponential of large logits would overflow.
    """

    def scale(_: jax.Array | int, bias: Float[Array, "G E"]) -> Float[Array, "G E"]:
        row = logits - jax.nn.logsumexp(logits + bias[:, None], axis=2, keepdims=True)
        return -jax.nn.logsumexp(jnp.where(real[..., None], row, _NOTHING), axis=1)

    return jax.lax.fori_loop(0, iterations, scale, jnp.zeros_like(logits[:, 0]))


_NOTHING = -1e30
"""The logarithm of nothing, finite: a group of padding alone must not become NaN."""
