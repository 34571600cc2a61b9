"""The mixture-of-experts layer: route, dispatch, run the experts, combine, measure.

layer = MoE(experts=8, router=TopK(k=2), expert=SwiGLU(hidden=256)).build(width=128, key=key)
y, stats = layer(x)                               # x [..., 128]
loss = task_loss(y) + stats.loss
layer.update_router_state(stats.router_state)     # after the step; only routers that remember need it
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .dispatchers import Dispatcher, DroplessDispatcher
from .experts import Experts, SwiGLU
from .feed_forward import FeedForward, Tap, no_tap
from .latent import Latent
from .losses import BalanceLoss, RouterLoss, check_coefficient
from .placement import Placement
from .residual import Residual
from .routers import TopK
from .routing import NO_CONTEXT, Router, RouterState, RoutingContext
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
    dispatcher: Dispatcher = DroplessDispatcher()
    """Carries tokens to experts and back."""
    shared: Experts | None = None
    """An expert that every token passes besides those it is routed to; n shared experts of hidden width F are one of
    n * F. Dai et al. 2024 (DeepSeekMoE), https://arxiv.org/abs/2401.06066. See also `GatedShared`."""
    latent: Latent | None = None
    """A narrower width that the routed experts work in."""
    residual: Residual | None = None
    """A dense network that the routed and shared experts correct."""
    losses: tuple[RouterLoss, ...] = (BalanceLoss(),)
    """Auxiliary losses of the router, each class at most once: metrics name them by it."""

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError(f"MoE.experts is {self.experts}; it must be at least 1")
        if self.router.experts_per_token > self.experts:
            raise ValueError(
                f"MoE.router is {self.router}, which sends a token to {self.router.experts_per_token:g} experts; "
                f"MoE.experts is {self.experts}: it must be at least as many"
            )
        if not isinstance(self.losses, tuple) or not all(isinstance(loss, RouterLoss) for loss in self.losses):
            raise ValueError(f"MoE.losses is {self.losses}; it must be a tuple of router losses")
        for loss in self.losses:
            check_coefficient(loss)
            loss.check(self.router)
        names = [type(loss).__name__ for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"MoE.losses holds {names}; each class may stand there once")

    @property
    def active_fraction(self) -> float:
        return self.router.experts_per_token / self.experts

    @property
    def vocabulary(self) -> int | None:
        return self.router.vocabulary

    @property
    def looks_ahead(self) -> bool:
        return self.router.looks_ahead or self.dispatcher.looks_ahead

    def batch_dependence(self, placement: Placement | None) -> str | None:
        if self.router.depends_on_batch:
            return f"the router {type(self.router).__name__}"
        if self.dispatcher.depends_on_batch(placement):
            return f"the dispatcher {type(self.dispatcher).__name__}"
        return None

    def build(self, *, width: int, key: jax.Array) -> "MoELayer":
        return MoELayer(self, width=width, key=key)


class MoELayer(nnx.Module):
    """The built layer. A call changes nothing in it: statistics and a router's new state are returned."""

    def __init__(self, config: MoE, *, width: int, key: jax.Array):
        router, experts = jax.random.split(key)
        shared, latent, residual = (jax.random.fold_in(key, number) for number in (2, 3, 4))
        inner = width if config.latent is None else config.latent.width
        self.config = config
        self.width = width
        self.router = config.router.build(width=width, experts=config.experts, key=router)
        self.experts = config.expert.build(experts=config.experts, width=inner, key=experts)
        self.shared = None if config.shared is None else config.shared.build(experts=1, width=width, key=shared)
        self.latent = None if config.latent is None else config.latent.build(width=width, key=latent)
        self.residual = None if config.residual is None else config.residual.build(width=width, key=residual)

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

        Raises:
            ValueError: the width of x is not the layer's, the mask or the token ids are not one per token, or the
                router returned a state that it does not have.
        """
        self._check(x, context)
        context = context._replace(sequence_length=x.shape[-2] if x.ndim > 1 else 1)
        # Zero first: a product with 0 would not keep a NaN at padding out of losses and gradients.
        tokens = _masked(x.reshape(-1, x.shape[-1]), context.mask)
        routing, state = self.router(tokens, context)
        stranger = (routing.expert < 0) | (routing.expert > self.config.experts)
        routing = routing._replace(expert=jnp.where(stranger, self.config.experts, routing.expert))
        tap("ffn", x, routing)
        inner = tokens if self.latent is None else self.latent.enter(tokens)
        carried = self.config.dispatcher.run(self.experts, inner, routing, context)
        y = carried.y if self.latent is None else self.latent.leave(carried.y)
        if self.shared is not None:
            y = y + self.shared(tokens[None], None)[0]
        if self.residual is not None:
            y = self.residual(tokens, y)
        stats = moe_stats(routing, context, self.config.losses, carried, self._checked(state or {}))
        return _masked(y, context.mask).reshape(x.shape), stats

    def _check(self, x: Float[Array, "*batch D"], context: RoutingContext) -> None:
        """Refuse arguments that do not fit, before they meet in a product or a broadcast."""
        if x.shape[-1] != self.width or 0 in x.shape:
            raise ValueError(f"x has shape {x.shape}; it must be [..., {self.width}], with at least one token")
        tokens = math.prod(x.shape[:-1])
        for name in ("mask", "token_ids"):
            array = getattr(context, name)
            if array is not None and array.shape != (tokens,):
                raise ValueError(f"context.{name} has shape {array.shape}; it must be ({tokens},), one per token of x")

    def update_router_state(self, values: Mapping[str, jax.Array]) -> None:
        """Store new values of the router's state, `stats.router_state`, outside of the gradient."""
        held = self._router_states()
        for name, value in self._checked(values).items():
            held[name][...] = value

    def _router_states(self) -> dict[str, RouterState]:
        """The router's `RouterState`s by their path in it: "bias", or "balancing.bias" in a module that it holds."""
        modules = nnx.iter_graph(self.router)
        return {".".join(map(str, path)): value for path, value in modules if isinstance(value, RouterState)}

    def _checked(self, values: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """Raise ValueError where a value is not that of one of the router's `RouterState`s."""
        held = self._router_states() if values else {}
        for name, value in values.items():
            if name not in held:
                raise ValueError(
                    f"{type(self.router).__name__} returned a new value of {name!r}; its RouterState variables are "
                    f"{sorted(held)}"
                )
            if (value.shape, value.dtype) != (held[name].shape, held[name].dtype):
                raise ValueError(
                    f"{type(self.router).__name__}.{name} is to become {value.dtype}{list(value.shape)}; it must stay "
                    f"{held[name].dtype}{list(held[name].shape)}"
                )
        return values


def _masked(y: Float[Array, "T D"], mask: Bool[Array, " T"] | None) -> Float[Array, "T D"]:
    """Zero at padding."""
    return y if mask is None else jnp.where(mask[:, None], y, 0)
