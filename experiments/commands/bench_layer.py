"""`dynamoe bench moe_layer`: a layer, forward and backward, against its bare products and another library's layer.

Letters: T tokens, D width, F hidden width, E experts, K experts per token, A = T * K assignments.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.console import Console

from ...kernels import grouped_matmul
from ...kernels.measuring import Call, in_turns, ratio
from ...moe import DenseDispatcher, Experts, MoE, SwiGLU, TopK
from ..page import Table
from ..tables import for_terminal

LAYER_ERROR = 1e-4
"""Allowed error of an output or a gradient, as a part of its largest element."""
LAYER, MOVES, OWN = "the layer", "the layer, its experts passing rows on", "its products alone"
TORCH, PEER = "its products by torch's grouped_mm", "transformers' OLMoE block, grouped_mm"


class Shape(NamedTuple):
    """Of a layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    chosen: int


OLMOE_LIKE = Shape(tokens=4096, width=512, hidden=256, experts=64, chosen=8)
"""OLMoE's experts and choice at a quarter of its widths: of a size for a CPU."""


@dataclass(frozen=True, kw_only=True)
class PassingOn(Experts):
    """Experts without a product: what is left of a layer is routing, sorting, gathering and combining."""

    def build(self, *, experts: int, width: int, key: jax.Array) -> "PassingOnExperts":
        return PassingOnExperts()


class PassingOnExperts(nnx.Module):
    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        return rows


def bench_layer(rounds: int, console: Console, shape: Shape = OLMOE_LIKE) -> int:
    """Check the layer's output and gradients, then time it; 1 where they are wrong."""
    config = _config(shape, SwiGLU(hidden=shape.hidden))
    params, layer = _compiled(config, shape)
    x, dy = (jax.random.normal(jax.random.key(seed), (1, shape.tokens, shape.width)) for seed in (1, 2))
    peers = _with_torch(shape, params, x, dy) if importlib.util.find_spec("torch") else _Peers({}, None)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"{' and '.join(missing)} is not installed: no comparison with it", highlight=False)
    console.print(
        f"{shape.tokens:,} tokens of width {shape.width}, {shape.experts} experts of hidden width {shape.hidden}, "
        f"{shape.chosen} per token, float32; forward and backward",
        highlight=False,
    )
    if not all(check(console) for check in _checks(config, shape, layer, params, x, dy, peers)):
        console.print("a result is wrong: nothing is timed")
        return 1
    passing, moves = _compiled(_config(shape, PassingOn()), shape)
    products = _products(shape)
    calls = {
        LAYER: Call(lambda: layer(params, x, dy)),
        MOVES: Call(lambda: moves(passing, x, dy)),
        OWN: Call(products),
        **peers.calls,
    }
    for call in calls.values():
        call()
    seconds = in_turns(calls, rounds)
    measure = TORCH if TORCH in seconds else OWN
    rows = [
        (name, f"{np.median(of) * 1e3:.0f}", f"{ratio(of, seconds[measure]).median:.2f}")
        for name, of in seconds.items()
    ]
    caption = f"Medians of {rounds} rounds in turns; the ratio is that of the times of one round, to {measure}."
    console.print(for_terminal(Table(("", "ms", "ratio"), rows, caption)))
    return 0


class _Peers(NamedTuple):
    calls: dict[str, Call]
    results: Callable[[], tuple[np.ndarray, ...]] | None
    """Output, gradient of x and of the down projections, by the other library; None where it is not installed."""


def _config(shape: Shape, expert: Experts) -> MoE:
    router = TopK(k=shape.chosen, renormalize=False)
    return MoE(experts=shape.experts, router=router, expert=expert, losses=())


def _compiled(config: MoE, shape: Shape) -> tuple[nnx.State, Callable[..., Any]]:
    """The layer's parameters, and its output and gradients as a function of them, of x and of the output's gradient."""
    layer = config.build(width=shape.width, key=jax.random.key(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params: nnx.State, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any]:
        y, back = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x)[0], params, x)
        return y, back(dy)

    return params, run


def _products(shape: Shape) -> Callable[[], Any]:
    """The grouped products of SwiGLU experts over equal groups, forward and backward, and nothing else."""
    assignments = shape.tokens * shape.chosen
    sizes = jnp.full(shape.experts, assignments // shape.experts, jnp.int32)
    keys = iter(jax.random.split(jax.random.key(3), 7))
    x, hidden = (jax.random.normal(next(keys), (assignments, n)) for n in (shape.width, shape.hidden))
    gate, up = (jax.random.normal(next(keys), (shape.experts, shape.width, shape.hidden)) for _ in range(2))
    down = jax.random.normal(next(keys), (shape.experts, shape.hidden, shape.width))

    @jax.jit
    def run(x: jax.Array, hidden: jax.Array, weights: tuple[jax.Array, ...]) -> list[Any]:
        results = []
        for rows, weight, dy in zip((x, x, hidden), weights, (hidden, hidden, x), strict=True):
            y, back = jax.vjp(lambda rows, weight: grouped_matmul(rows, weight, sizes), rows, weight)
            results.append((y, back(dy)))
        return results

    return lambda: run(x, hidden, (gate, up, down))


def _checks(
    config: MoE, shape: Shape, layer: Callable, params: nnx.State, x: jax.Array, dy: jax.Array, peers: _Peers
) -> Iterator[Callable[[Console], bool]]:
    """Against every expert on every one of some tokens, and against the other library on all."""
    some = min(512, shape.tokens)
    _, oracle = _compiled(dataclasses.replace(config, dispatcher=DenseDispatcher()), shape)
    part = (x[:, :some], dy[:, :some])
    yield lambda console: _equal("every expert on every token", layer(params, *part), oracle(params, *part), console)
    if (results := peers.results) is not None:
        yield lambda console: _equal(PEER, _shown(layer(params, x, dy)), results(), console)


def _shown(result: tuple[jax.Array, Any]) -> tuple[np.ndarray, ...]:
    y, (dparams, dx) = result
    return tuple(np.asarray(array) for array in (y, dx, dparams["experts"]["down"][...]))


def _equal(name: str, found: Any, expected: Any, console: Console) -> bool:
    errors = [
        np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-30)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    console.print(f"largest error against {name}: {max(errors):.1e}, allowed is {LAYER_ERROR:.0e}", highlight=False)
    return bool(max(errors) <= LAYER_ERROR)


def _with_torch(shape: Shape, params: nnx.State, x: jax.Array, dy: jax.Array) -> _Peers:
    """The same products by torch, and transformers' layer with the same weights where it is installed."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array)).requires_grad_()

    assignments = shape.tokens * shape.chosen
    ends = torch.arange(1, shape.experts + 1, dtype=torch.int32) * (assignments // shape.experts)
    rows, hidden = torch.randn(assignments, shape.width), torch.randn(assignments, shape.hidden)
    gate, up, down = (tensor(params["experts"][name][...]) for name in ("gate", "up", "down"))
    operands = [(rows, gate, hidden), (rows, up, hidden), (hidden, down, rows)]

    def products() -> None:
        for a, weight, gradient in operands:
            a = a.detach().requires_grad_()
            y = torch.nn.functional.grouped_mm(a, weight, offs=ends)
            torch.autograd.grad(y, (a, weight), gradient)

    calls = {TORCH: Call(products, lambda _: None)}
    if importlib.util.find_spec("transformers") is None:
        return _Peers(calls, None)
    block, given, gradient = _transformers_block(shape, params), tensor(x), torch.from_numpy(np.array(dy))

    def run() -> tuple[Any, ...]:
        y = block(given)
        return (y, *torch.autograd.grad(y, (given, *block.parameters()), gradient))

    def results() -> tuple[np.ndarray, ...]:
        y, dx, *dparams = run()
        named = dict(zip((name for name, _ in block.named_parameters()), dparams, strict=True))
        return tuple(array.detach().numpy() for array in (y, dx, named["experts.down_proj"].transpose(1, 2)))

    return _Peers(calls | {PEER: Call(run, lambda _: None)}, results)


def _transformers_block(shape: Shape, params: nnx.State) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import OlmoeConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.olmoe import modeling_olmoe  # pyright: ignore[reportMissingImports]

    config = OlmoeConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=False,
        experts_implementation="grouped_mm",
    )
    block = modeling_olmoe.OlmoeSparseMoeBlock(config)
    gate, up, down = (np.asarray(params["experts"][name][...]).swapaxes(1, 2) for name in ("gate", "up", "down"))
    values = {
        "gate.weight": np.asarray(params["router"]["gate"]["kernel"][...]).T,
        "experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        "experts.down_proj": down,
    }
    block.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()})
    return block
