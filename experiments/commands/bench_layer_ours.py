"""What of ours `dynamoe bench moe_layer` times: the layer in all its variants, and what it is made of.

Letters: T tokens, D width, F hidden width, E experts, K experts per token, A = T * K assignments.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...kernels import grouped_matmul
from ...kernels.grouped_matmul.bench import COSTS_TIMES_E, MADE_FOR, implementations
from ...kernels.measuring import Call
from ...kernels.token_matmul.api import GATHERS
from ...moe import DenseDispatcher, Experts, FusedDispatcher, MoE, SwiGLU
from .bench_layer_problem import Problem, Shape, layer_config, parameters, weights_in

LAYER, RAGGED_DOT, FUSED = "the layer", "the layer by lax.ragged_dot", "the layer, fused"
MOVES, OWN = "the layer, its experts passing rows on", "its products alone"
AFFORDABLE = {"cpu": 5e11, "gpu": 9e14}
"""Floating-point operations of every row with every expert, forward and backward, above which `lax.ragged_dot` is left
out where that is what it does."""
CHECKED_COLUMNS = 64
"""Of a weight's gradient, from the first to the last: DeepSeek-V3's are 7.5 GB each, and are compared on the host."""


class Results(NamedTuple):
    """The output and the gradients of the input and the weights, these in some columns alone; rows are tokens."""

    y: Any
    x: Any
    router: Any
    gate: Any
    up: Any
    down: Any


class Timed(NamedTuple):
    """A contender that is ready to be called."""

    call: Call
    temporary_bytes: int | None
    """What it needs at once beyond arguments and outputs, as the compiler plans it; None: not counted."""
    results: Callable[[jax.Array], Results] | None = None
    """What it makes of another gradient of the output; None: nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class PassingOn(Experts):
    """Experts without a product: what is left of a layer is routing, sorting, gathering and combining."""

    def build(self, *, experts: int, width: int, key: jax.Array) -> "PassingOnExperts":
        return PassingOnExperts()


class PassingOnExperts(nnx.Module):
    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        return rows


def variants(shape: Shape) -> dict[str, MoE]:
    """The layers that are compared, by name: the default first."""
    return {
        LAYER: layer_config(shape),
        FUSED: _fused(None, shape),
        **{f"{LAYER} by {name}": _by(name, shape) for name in _made_for_here()},
        **{f"{FUSED} by {name}": _fused(name, shape) for name in _made_for_here() if name in GATHERS},
        **({} if ragged_dot_work(shape) > _affordable() else {RAGGED_DOT: _by("xla", shape)}),
    }


def notes(shape: Shape) -> Iterator[str]:
    """What is not among the variants, and why."""
    if (work := ragged_dot_work(shape)) > _affordable():
        yield (
            f"{RAGGED_DOT} is left out: it does E times the work here, {work:.0e} FLOPs; above {_affordable():.0e} it "
            "is left out"
        )


def ragged_dot_work(shape: Shape) -> float:
    """Floating-point operations of its products, forward and backward."""
    return shape.flops * (shape.experts if "xla" in COSTS_TIMES_E[jax.default_backend()] else 1)


def timed_layer(config: MoE, problem: Problem) -> Timed:
    """The layer, forward and backward, as one program over all tokens."""
    params, x = problem.params, problem.x
    program = jax.jit(_pass(config, problem.shape)).lower(params, x, problem.dy).compile()

    def results(dy: jax.Array) -> Results:
        return _on_host(_shown(*program(params, x, dy)))

    return Timed(Call(lambda: program(params, x, problem.dy)), _temporary_bytes(program), results)


def timed_moves(problem: Problem) -> Timed:
    """What is left of the layer without its products."""
    config, x, dy = layer_config(problem.shape, PassingOn()), problem.x, problem.dy
    params = parameters(config, problem.shape)
    program = jax.jit(_pass(config, problem.shape)).lower(params, x, dy).compile()
    return Timed(Call(lambda: program(params, x, dy)), _temporary_bytes(program))


def timed_products(problem: Problem) -> Timed:
    """The grouped products of SwiGLU experts over equal groups, forward and backward, and nothing else."""
    shape, (_, *weights) = problem.shape, problem.weights
    assignments = shape.tokens * shape.chosen
    sizes = jnp.full(shape.experts, assignments // shape.experts, jnp.int32)
    rows, hidden = (
        jax.random.normal(jax.random.key(seed), (assignments, columns)).astype(shape.dtype)
        for seed, columns in ((3, shape.width), (4, shape.hidden))
    )

    def run(rows: jax.Array, hidden: jax.Array, weights: list[jax.Array]) -> list[Any]:
        results = []
        for x, weight, dy in zip((rows, rows, hidden), weights, (hidden, hidden, rows), strict=True):
            y, back = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes), x, weight)
            results.append((y, back(dy)))
        return results

    program = jax.jit(run).lower(rows, hidden, weights).compile()
    return Timed(Call(lambda: program(rows, hidden, weights)), _temporary_bytes(program))


def every_expert_on_every_token(problem: Problem, tokens: jax.Array) -> Results:
    """Of these tokens alone: the oracle."""
    config = dataclasses.replace(layer_config(problem.shape), dispatcher=DenseDispatcher())
    run = _pass(config, problem.shape)
    # In one program, which then holds no weight's gradient whole that need not be.
    oracle = jax.jit(lambda params, x, dy: _shown(*run(params, x, dy)))
    return _on_host(oracle(problem.params, problem.x[:, tokens], problem.dy[:, tokens]))


def checked_columns(width: int) -> np.ndarray:
    """The columns of a weight's gradient that are compared: all, or some."""
    return np.unique(np.linspace(0, width - 1, CHECKED_COLUMNS, dtype=np.int64))


def _by(implementation: str, shape: Shape) -> MoE:
    return layer_config(shape, SwiGLU(hidden=shape.hidden, implementation=implementation))


def _fused(implementation: str | None, shape: Shape) -> MoE:
    return dataclasses.replace(layer_config(shape), dispatcher=FusedDispatcher(implementation=implementation))


def _made_for_here() -> tuple[str, ...]:
    """Our implementations for this accelerator. On CPU the default is one of them, and the other is for those without a
    compiler."""
    here = jax.default_backend()
    return () if here == "cpu" else tuple(name for name in implementations(here) if MADE_FOR.get(name) == here)


def _affordable() -> float:
    return AFFORDABLE.get(jax.default_backend(), float("inf"))


def _pass(config: MoE, shape: Shape) -> Callable[..., Any]:
    """The layer's output, and the gradients of x and of the parameters, as a function of the parameters, x and dy."""
    layer = nnx.eval_shape(functools.partial(config.build, width=shape.width), key=jax.random.key(0))
    graph, _, rest = nnx.split(layer, nnx.Param, ...)

    def run(params: nnx.State, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, nnx.State]:
        y, back = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x)[0], params, x)
        dparams, dx = back(dy)
        return y, dx, dparams

    return run


def _shown(y: jax.Array, dx: jax.Array, dparams: nnx.State) -> Results:
    weights = (gradient[..., checked_columns(gradient.shape[-1])] for gradient in weights_in(dparams))
    return Results(y[0], dx[0], *weights)


def _on_host(results: Results) -> Results:
    return Results(*(np.asarray(array, np.float32) for array in results))


def _temporary_bytes(program: jax.stages.Compiled) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes
