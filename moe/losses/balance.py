"""The load-balancing loss of Switch Transformer and GShard, over the batch or sequence by sequence."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routing import Routing, RoutingContext
from .loss import RouterLoss
from .scope import GlobalBatch, Scope


@dataclass(frozen=True, kw_only=True)
class BalanceLoss(RouterLoss):
    """Switch load-balancing loss, E * sum_e f_e P_e. Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4-6.

    f is each expert's share of the *assignments* (transformers takes the share of tokens, which is K times larger),
    P its mean probability: the loss is 1 when both are uniform, for every K.

    With `PerSequence` it is DeepSeek-V3's complementary sequence-wise loss, https://arxiv.org/abs/2412.19437,
    eq. 17-20 (there with a coefficient of 1e-4). Eq. 18 counts the K highest scores; here f counts the assignments as
    the router made them, with its balance bias and its groups.
    """

    coefficient: float = 0.01
    scope: Scope = GlobalBatch()
    """The tokens that f and P are means over before they are multiplied."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        parts, experts = self.scope.parts(routing, context), routing.probs.shape[1]
        count = parts.assigned(routing, jnp.ones(routing.expert.shape, jnp.float32))
        share = count / jnp.maximum(count.sum(axis=1, keepdims=True), 1.0)
        return parts.join(experts * (share * parts.mean(routing.probs)).sum(axis=1))
