"""Training in two stages: the routers alone, then everything.

An upcycled model begins with experts that are trained and routers that are not. In the first stage the routers learn to
use what is there before it moves. After plain copies (`Copy`) with renormalised weights all experts are the same: the
task teaches the router nothing until they move, only auxiliary losses do; noise or a split makes them differ.

Each stage is a run of the optimizer of its own, with its own moments and its own schedule: warm-up and decay over the
first stage's steps, and again over the rest.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .optimizers import Muon, TrainingRule


@dataclass(frozen=True, kw_only=True)
class RouterFirst(TrainingRule):
    """Update the routers alone for the first steps, then everything.

    In the first stage the other parameters keep their bits, and have no moments and no decay. What is a router is told
    by the path: a parameter below a module named "router". A `RouterState`, as a balance bias, moves in both stages.
    """

    optimizer: TrainingRule = Muon()
    """Makes the updates of both stages."""
    steps: int = 100
    """Steps of the first stage; fewer than the run has."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"RouterFirst.steps is {self.steps}; it must be at least 1")

    def build(self, params: nnx.State, *, steps: int) -> optax.GradientTransformation:
        self._check(steps)
        routers, rest = nnx.split_state(params, _is_router, ...)
        if not nnx.to_flat_state(routers):
            raise ValueError("optimizer is a RouterFirst, and the model has no router; it needs a mixture of experts")
        first = self.optimizer.build(routers, steps=self.steps)
        then = self.optimizer.build(params, steps=steps - self.steps)

        def init(params: Any) -> "RouterFirstState":
            routers, _ = nnx.split_state(params, _is_router, ...)
            return RouterFirstState(jnp.zeros((), jnp.int32), first.init(routers), then.init(params))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, "RouterFirstState"]:
            def routers_alone() -> tuple[Any, Any, Any]:
                of_routers, of_rest = nnx.split_state(updates, _is_router, ...)
                moved: Any
                moved, moments = first.update(of_routers, state.first, nnx.split_state(params, _is_router, ...)[0])
                return nnx.merge_state(moved, jax.tree.map(jnp.zeros_like, of_rest)), moments, state.then

            def everything() -> tuple[Any, Any, Any]:
                moved, moments = then.update(updates, state.then, params)
                return moved, state.first, moments

            # A cond runs one branch: the first stage does not pay for the updates of the experts.
            moved, of_first, of_then = jax.lax.cond(state.step < self.steps, routers_alone, everything)
            return moved, RouterFirstState(state.step + 1, of_first, of_then)

        return optax.GradientTransformation(init, update)

    def rate(self, *, steps: int) -> optax.Schedule:
        self._check(steps)
        stages = [self.optimizer.rate(steps=self.steps), self.optimizer.rate(steps=steps - self.steps)]
        return optax.join_schedules(stages, [self.steps])

    def _check(self, steps: int) -> None:
        if self.steps >= steps:
            raise ValueError(f"RouterFirst.steps is {self.steps}; it must be below the run's steps, {steps}")


class RouterFirstState(NamedTuple):
    """The states of the two stages; the one whose turn it is not stands still."""

    step: jax.Array
    """Updates done."""
    first: Any
    then: Any


def _is_router(path: tuple[Any, ...], _: Any) -> bool:
    return "router" in path
