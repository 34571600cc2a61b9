"""Expert parallelism: experts are spread over devices, and tokens travel to them.

Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668. The experts are split over the mesh axes of the
logical axis "expert"; the batch is split over these axes too, so that each device has tokens of its own and some of
the experts. What else splits a weight (fsdp, tensor): see on_mesh.py. Routing, losses, statistics and shared experts
stay outside, in the hands of XLA: statistics are those of the whole batch on every device, and a shared expert's
products depend on nothing of the exchange, so that they can run while it is under way.
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from ..experts import ExpertsModule
from ..placement import Placement
from ..routing import NO_CONTEXT, Routing, RoutingContext
from .dispatcher import Carried, Dispatcher
from .exchanges import Exchange, ExpertAxes, RaggedAllToAll
from .on_mesh import Local, assignments_divide, local_tokens, run_on_mesh


@dataclass(frozen=True, kw_only=True)
class ExpertParallel(Dispatcher):
    """Tokens travel to the devices of their experts. Where one device has all experts, it is `exchange.local`."""

    exchange: Exchange = RaggedAllToAll()
    """How they travel."""

    @property
    def looks_ahead(self) -> bool:
        return self.exchange.local(NO_CONTEXT).looks_ahead

    def depends_on_batch(self, placement: Placement | None) -> bool:
        # The devices do not depend on the number of experts: 0 divides over any.
        axes = None if placement is None else _expert_axes(placement, 0)
        overflows = axes is not None and self.exchange.may_overflow(axes.devices)
        return overflows or self.exchange.local(NO_CONTEXT).depends_on_batch(placement)

    def plan(self, routing: Routing, context: RoutingContext = NO_CONTEXT) -> Any:
        return self.exchange.local(context).plan(routing, context)

    def dispatch(self, x: Float[Array, "T D"], plan: Any) -> Float[Array, "..."]:
        return self.exchange.local(NO_CONTEXT).dispatch(x, plan)

    def combine(self, rows: Float[Array, "..."], plan: Any) -> Float[Array, "T D"]:
        return self.exchange.local(NO_CONTEXT).combine(rows, plan)

    def run(
        self, experts: ExpertsModule, x: Float[Array, "T D"], routing: Routing, context: RoutingContext = NO_CONTEXT
    ) -> Carried:
        """Carry the tokens to the experts and back.

        Raises:
            ValueError: experts or tokens do not divide over the mesh, experts are split over an axis that tokens are
                not, or what is dropped would depend on the mesh.
        """
        placement = context.placement
        axes = None if placement is None else _expert_axes(placement, routing.logits.shape[1])
        if placement is None or axes is None:
            return self.exchange.local(context).run(experts, x, routing, context)
        tokens = local_tokens(x.shape[0], placement)
        if not assignments_divide(routing, tokens):
            raise ValueError(
                f"the router has routing groups of {routing.group or x.shape[0]} tokens; with ExpertParallel they must "
                f"divide the {tokens} tokens of a device"
            )
        self.exchange.check(tokens, context)

        def run(module: ExpertsModule, x: Any, mine: Routing, here: RoutingContext) -> Local:
            return self.exchange.run(module, x, mine, here, axes)

        return Carried(*run_on_mesh(run, experts, x, routing, context, keep=axes.names))


def _expert_axes(placement: Placement, experts: int) -> ExpertAxes | None:
    """The mesh axes that experts are split over; None: each device has all of them."""
    entry = placement.spec(("expert",), (experts,), "experts")[0]
    if not entry:
        return None
    names = entry if isinstance(entry, tuple) else (entry,)
    if strange := [name for name in names if name not in placement.batch_axes]:
        raise ValueError(
            f"experts are split over the mesh axis {strange[0]!r}, and the batch over {list(placement.batch_axes)}; "
            "with ExpertParallel the batch must be split over each axis that experts are: add it to MeshRules.batch"
        )
    return ExpertAxes(names, math.prod(placement.mesh.shape[name] for name in names))
