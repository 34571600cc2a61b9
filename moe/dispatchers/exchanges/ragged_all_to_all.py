"""Dropless ragged all-to-all: each device sends each other exactly the rows that its experts are to see.

MegaBlocks' dropless mixture, Gale et al. 2022, https://arxiv.org/abs/2211.15841, across devices. Shapes are static,
so a device has room for R rows, and R is stated; what comes beyond it is lost, counted as overflow, and can be made
to fail the step. Balanced, it moves A * D numbers per device and direction, of which (N - 1) / N leave the device.
Letters: T tokens of the device, D width, E experts, N devices that share them, A assignments of the device, R rows it
has room for.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ....kernels import Permutation, permute, sort_by_expert, unpermute
from ....kernels.ragged_all_to_all import Slices, ragged_all_to_all
from ...experts import ExpertsModule
from ...routing import Routing, RoutingContext
from ..dispatcher import Dispatcher
from ..dropless import DroplessDispatcher
from ..on_mesh import Local
from .exchange import Exchange, ExpertAxes

ROW_MULTIPLE = 8
"""Rooms are rounded up to whole tiles of a TPU."""


@dataclass(frozen=True, kw_only=True)
class RaggedAllToAll(Exchange):
    """As many rows as there are, up to a stated bound."""

    room: float = 2.0
    """R as a multiple of a device's own assignments, which is what a balanced load brings; from as many devices as
    share the experts on, nothing can overflow."""
    fail: bool = False
    """Make the output NaN where anything overflows, so that a training step fails instead of losing assignments."""
    implementation: str | None = None
    """Of the exchange, see `kernels.ragged_all_to_all`; none: the platform's best."""

    def __post_init__(self):
        if not 0 < self.room < math.inf:
            raise ValueError(f"RaggedAllToAll.room is {self.room}; it must be above 0 and finite")

    def local(self, context: RoutingContext) -> Dispatcher:
        return DroplessDispatcher()

    def check(self, tokens: int, context: RoutingContext) -> None:
        """A mesh changes nothing but what overflows, and that is counted."""

    def may_overflow(self, devices: int) -> bool:
        return self.room < devices

    def rows(self, assignments: int, devices: int) -> int:
        """R, the rows that a device has room for."""
        wanted = math.ceil(round(min(self.room, devices) * assignments, 6))
        return -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE

    def run(
        self,
        experts: ExpertsModule,
        x: Float[Array, "T D"],
        routing: Routing,
        context: RoutingContext,
        axes: ExpertAxes,
    ) -> Local:
        assignments, count = routing.expert.shape[0], routing.logits.shape[1]
        room, me = self.rows(assignments, axes.devices), jax.lax.axis_index(axes.names)
        places = sort_by_expert(routing.expert, count)
        sizes = jax.lax.all_gather(places.group_sizes, axes.names).reshape(axes.devices, axes.devices, -1)
        traffic = _traffic(sizes, room)
        there, back = _slices(traffic, me)

        rows = permute(x, places, routing.token)  # [A, D], sorted by expert and so by device
        received = ragged_all_to_all(
            rows, there, room=room, axis=axes.names, implementation=self.implementation
        )  # sender by sender, each sorted by expert
        by_expert = sort_by_expert(_expert_of_row(traffic, me, room), sizes.shape[2])
        y = experts(permute(received, by_expert), by_expert.group_sizes)
        returned = ragged_all_to_all(
            permute(y, _inverse(by_expert)), back, room=assignments, axis=axes.names, implementation=self.implementation
        )
        y = unpermute(returned, routing.weight, places, routing.token, tokens=x.shape[0])

        lost = (traffic.wanted - traffic.sent)[me].sum().astype(jnp.float32)
        if self.fail:
            anywhere = (traffic.wanted > traffic.sent).any()
            y = jnp.where(anywhere, jnp.nan, y)
        share = lost / jnp.maximum(traffic.wanted[me].sum(), 1).astype(jnp.float32)
        return Local(y, share, share)


class Traffic(NamedTuple):
    """Rows from each device (first axis) to each (second); the last axis of `sizes` is the receiver's experts."""

    sizes: Int[Array, "N N experts"]
    wanted: Int[Array, "N N"]
    sent: Int[Array, "N N"]
    """What finds room: a receiver fills up in the order of the senders, each in the order of its experts."""


def _traffic(sizes: Int[Array, "N N experts"], room: int) -> Traffic:
    wanted = sizes.sum(axis=2)
    return Traffic(sizes, wanted, jnp.clip(room - _before(wanted, 0), 0, wanted))


def _slices(traffic: Traffic, me: jax.Array) -> tuple[Slices, Slices]:
    """This device's part in the exchange to the experts, and in the one back."""
    held_at, received_at = _before(traffic.wanted, 1), _before(traffic.sent, 0)
    sent, received = traffic.sent[me], traffic.sent[:, me]
    there = Slices(held_at[me], sent, received_at[me], received)
    back = Slices(received_at[:, me], received, held_at[:, me], sent)
    return there, back


def _expert_of_row(traffic: Traffic, me: jax.Array, room: int) -> Int[Array, " R"]:
    """The expert, of this device's, of each row that it received; past the last row: nobody."""
    sizes = traffic.sizes[:, me]
    arrived = jnp.clip(traffic.sent[:, me, None] - _before(sizes, 1), 0, sizes)
    ends = jnp.cumsum(arrived.reshape(-1))
    run = jnp.searchsorted(ends, jnp.arange(room, dtype=ends.dtype), side="right").astype(jnp.int32)
    experts = sizes.shape[1]
    return jnp.where(run < ends.shape[0], run % experts, experts)


def _before(sizes: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """The sum of those that stand before each."""
    return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def _inverse(permutation: Permutation) -> Permutation:
    """From the rows back to the assignments."""
    return Permutation(permutation.assignment, permutation.row, permutation.group_sizes)
