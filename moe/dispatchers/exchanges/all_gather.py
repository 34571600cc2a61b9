"""All-gather and reduce-scatter: every device sees the tokens of all, runs its own experts on them, and the sums are
shared out.

For small meshes: nothing is dropped and nothing has to be agreed upon, but each device holds the tokens of all N and
room for all their assignments, N * A rows. Per device it moves N * T * D numbers each way, of which (N - 1) / N come
from others: less than an all-to-all where K is near N or above. Letters: T tokens of the device, D width, E experts,
N devices that share them, K experts per token, A assignments of the device.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...experts import ExpertsModule
from ...routing import Routing, RoutingContext, tokens_of
from ..dispatcher import Dispatcher
from ..dropless import DroplessDispatcher
from ..on_mesh import Local
from .exchange import Exchange, ExpertAxes


@dataclass(frozen=True, kw_only=True)
class AllGather(Exchange):
    """Tokens of all devices for the experts of each; nothing is dropped."""

    def local(self, context: RoutingContext) -> Dispatcher:
        return DroplessDispatcher()

    def check(self, tokens: int, context: RoutingContext) -> None:
        """A mesh changes nothing."""

    def run(
        self,
        experts: ExpertsModule,
        x: Float[Array, "T D"],
        routing: Routing,
        context: RoutingContext,
        axes: ExpertAxes,
    ) -> Local:
        def of_all(array: Array) -> Array:
            return jax.lax.all_gather(array, axes.names, tiled=True)

        own = routing.logits.shape[1] // axes.devices
        expert = of_all(routing.expert) - own * jax.lax.axis_index(axes.names)
        expert = jnp.where((expert >= 0) & (expert < own), expert, own)  # the others' experts are nobody here
        token = None
        if routing.token is not None:
            tokens = jnp.arange(axes.devices)[:, None] * x.shape[0] + tokens_of(routing)[None] * 0
            token = tokens.reshape(-1) + of_all(routing.token)
        everyone = of_all(x)
        shape = jnp.zeros((everyone.shape[0], own), jnp.float32)
        mine = Routing(expert, of_all(routing.weight), token, shape, shape)
        y = self.local(context).run(experts, everyone, mine, context).y
        return Local(jax.lax.psum_scatter(y, axes.names, tiled=True), *[jnp.zeros((), jnp.float32)] * 2)
