"""The mixture-of-experts layer: route, dispatch, run the experts, combine, measure.

layer = MoE(experts=8, router=TopK(k=2), expert=SwiGLU(hidden=256)).build(width=128, key=key)
y, stats = layer(x)          # x [..., 128]
loss = task_loss(y) + stats.loss
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float

from .dispatchers import DenseDispatcher, Dispatcher
from .experts import Experts, SwiGLU
from .feed_forward import FeedForward, Tap, no_tap
from .losses import BalanceLoss, RouterLoss
from .routers import TopK
from .routing import NO_CONTEXT, Router, RoutingContext
from .telemetry import MoEStats, moe_stats


@dataclass(frozen=True, kw_only=True)
class MoE(FeedForward):
    """A mixture of experts: who routes, who carries, who computes, and what the router is trained on."""

    experts: int = 8
    """Number of experts E."""
    router: Router = TopK()
    """Maps tokens to experts."""
    expert: Experts = SwiGLU()
    """The network that each expert is."""
    dispatcher: Dispatcher = DenseDispatcher()
    """Carries tokens to experts and back."""
    losses: tuple[RouterLoss, ...] = (BalanceLoss(),)
    """Auxiliary losses of the router, each class at most once: metrics name them by it."""

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError(f"MoE.experts is {self.experts}; it must be at least 1")
        if self.router.experts_per_token > self.experts:
            raise ValueError(
                f"MoE.router sends a token to {self.router.experts_per_token} experts; MoE.experts is {self.experts}: "
                "it must be at least as many"
            )
        names = [type(loss).__name__ for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"MoE.losses holds {names}; each class may stand there once")

    @property
    def active_fraction(self) -> float:
        return self.router.experts_per_token / self.experts

    def build(self, *, width: int, key: jax.Array) -> "MoELayer":
        return MoELayer(self, width=width, key=key)


class MoELayer(nnx.Module):
    """The built layer. It keeps nothing between calls: statistics are returned."""

    def __init__(self, config: MoE, *, width: int, key: jax.Array):
        router, experts = jax.random.split(key)
        self.config = config
        self.router = config.router.build(width=width, experts=config.experts, key=router)
        self.experts = config.expert.build(experts=config.experts, width=width, key=experts)

    def __call__(
        self, x: Float[Array, "*batch D"], context: RoutingContext = NO_CONTEXT, tap: Tap = no_tap
    ) -> tuple[Float[Array, "*batch D"], MoEStats]:
        """Mix the experts' outputs for each token.

        Args:
            x: activations, any batch axes before the width D.
            context: mask, token ids and key over the T flattened tokens; see `RoutingContext`.
            tap: looks at the layer's input and routing under the path "ffn".

        Returns:
            The output, in the shape and dtype of x (zero at padding), and the statistics of this call.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing, state = self.router(tokens, context)
        if state is not None:
            raise NotImplementedError(
                f"{type(self.router).__name__} returned a new state; routers with state come later"
            )
        tap("ffn", x, routing)
        dispatcher = self.config.dispatcher
        plan = dispatcher.plan(routing)
        rows = self.experts(dispatcher.dispatch(tokens, plan), plan.group_sizes)
        stats = moe_stats(routing, context.mask, self.config.losses)
        return dispatcher.combine(rows, plan).reshape(x.shape), stats
