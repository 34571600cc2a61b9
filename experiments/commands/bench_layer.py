"""`dynamoe bench moe_layer`: a layer, forward and backward, against its bare products and another library's layer.

Time, and the memory that a pass needs at once. Letters: T tokens, D width, E experts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ...kernels.grouped_matmul import bench as kernel
from ...kernels.grouped_matmul.cases import CPU_DIVISOR
from ...kernels.measuring import in_turns, ratio
from ..page import Table
from ..tables import for_terminal
from .bench_kernel import append_lines, facts
from .bench_layer_ours import (
    MOVES,
    OWN,
    Results,
    Timed,
    every_expert_on_every_token,
    notes,
    timed_layer,
    timed_moves,
    timed_products,
    variants,
)
from .bench_layer_problem import Problem, Shape, draw
from .bench_layer_torch import BLOCK, PRODUCTS, peer_versions, timed_torch_products, timed_transformers_block

ORACLE = "every expert on every token"
ORACLE_TOKENS = 512
"""That the oracle, which does E / K times the work, is computed for."""
Made = TypeVar("Made")


def bench_layer(shapes: Sequence[Shape], rounds: int, output: Path | None, console: Console) -> int:
    """One shape after the other: check outputs and gradients, then time; 1 where one is wrong.

    Args:
        shapes: of the layers.
        rounds: how often each contender is timed.
        output: for a JSON line of each contender; None: nowhere.
        console: for the rest.
    """
    return max(_bench(shape, rounds, output, console) for shape in shapes)


def _bench(shape: Shape, rounds: int, output: Path | None, console: Console) -> int:
    console.print(str(shape), highlight=False)
    if " / " in shape.model:
        console.print(f"on CPU tokens and widths are divided by {CPU_DIVISOR}", highlight=False)
    if shape.model and not shape.model.startswith("OLMoE"):
        console.print("transformers' block is OLMoE's, at this size", highlight=False)
    for note in notes(shape):
        console.print(note, highlight=False)
    problem = _attempt(shape.model or "the layer", lambda: draw(shape), console)
    if problem is None:
        return 0
    contenders = _contenders(problem, console)
    if reason := _mistake(problem, contenders, console):
        console.print(f"{reason}: nothing is timed")
        return 1
    seconds = in_turns({name: timed.call for name, timed in contenders.items()}, rounds)
    lines = [_line(shape, name, seconds, contenders[name]) for name in seconds]
    console.print(for_terminal(_table(lines, rounds)))
    if output is not None:
        append_lines(output, [{**line, **_machine()} for line in lines])
    return 0


def _contenders(problem: Problem, console: Console) -> dict[str, Timed]:
    """Those that can be had, each called once; of the others, why not."""
    makers: dict[str, Callable[[], Timed]] = {
        **{name: functools.partial(timed_layer, config, problem) for name, config in variants(problem.shape).items()},
        MOVES: lambda: timed_moves(problem),
        OWN: lambda: timed_products(problem),
    }
    peers: dict[str, Callable[[], Timed]] = {
        PRODUCTS: lambda: timed_torch_products(problem),
        BLOCK: lambda: timed_transformers_block(problem),
    }
    found = {
        name: _attempt(name, _called(make), console, peer=name in peers) for name, make in (makers | peers).items()
    }
    return {name: timed for name, timed in found.items() if timed is not None}


def _called(make: Callable[[], Timed]) -> Callable[[], Timed]:
    """The same, called once: what lacks memory says so then."""

    def made() -> Timed:
        timed = make()
        timed.call()
        return timed

    return made


def _attempt(name: str, make: Callable[[], Made], console: Console, peer: bool = False) -> Made | None:
    """What `make` returns; None, and the reason is printed, where a peer fails, ours refuses, or memory is too little.

    Any other error is a mistake of ours.
    """
    try:
        return make()
    except Exception as error:
        if not (peer or isinstance(error, NotImplementedError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    console.print(f"{name} is left out: {reason}", highlight=False)
    return None


def _mistake(problem: Problem, contenders: dict[str, Timed], console: Console) -> str:
    """Hold every layer against every expert on some tokens, and against the other library on all; empty if equal."""
    some = jnp.arange(min(ORACLE_TOKENS, problem.shape.tokens)) * max(problem.shape.tokens // ORACLE_TOKENS, 1)
    references = dict(_references(problem, contenders, some, console))
    found = [
        _equal(name, results, reference, expected, problem.shape, console)
        for reference, (given, tokens, expected) in references.items()
        for name, timed in contenders.items()
        if name != reference and (results := _results(timed, given, tokens)) is not None
    ]
    if not found:
        return "there is nothing to compare"
    return "" if all(found) else "a result is wrong"


def _references(
    problem: Problem, contenders: dict[str, Timed], some: jax.Array, console: Console
) -> Iterator[tuple[str, tuple[jax.Array, jax.Array, Results]]]:
    """What results are compared with: name, gradient of the output, tokens, and what is right.

    With a gradient that is 0 at all other tokens, the weights' gradients are those of some: so the very program that
    is timed, over all tokens, is held against the oracle.
    """
    oracle = _attempt(ORACLE, lambda: every_expert_on_every_token(problem, some), console)
    if oracle is not None:
        masked = jnp.zeros_like(problem.dy).at[:, some].set(problem.dy[:, some])
        yield ORACLE, (masked, some, oracle)
    if BLOCK in contenders and (results := contenders[BLOCK].results) is not None:
        yield BLOCK, (problem.dy, jnp.arange(problem.shape.tokens), results(problem.dy))


def _results(timed: Timed, dy: jax.Array, tokens: jax.Array) -> Results | None:
    if timed.results is None:
        return None
    results, rows = timed.results(dy), np.asarray(tokens)
    return results._replace(y=results.y[rows], x=results.x[rows])


def _equal(name: str, found: Results, reference: str, expected: Results, shape: Shape, console: Console) -> bool:
    errors = [np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(found, expected, strict=True)]
    worst = float(max(error if np.isfinite(error) else np.inf for error in errors))
    console.print(
        f"{name}: largest error against {reference}: {worst:.1e}, allowed is {shape.allowed_error:.0e}",
        highlight=False,
    )
    return worst <= shape.allowed_error


def _line(shape: Shape, name: str, seconds: dict[str, np.ndarray], timed: Timed) -> dict[str, Any]:
    measure = next(measure for measure in (PRODUCTS, OWN, *seconds) if measure in seconds)
    times, found = seconds[name], ratio(seconds[name], seconds[measure])
    return {
        "model": shape.model,
        "shape": {key: value for key, value in shape._asdict().items() if key != "model"},
        "contender": name,
        "seconds": {"median": float(np.median(times)), "fastest": float(times.min())},
        "ratio": {measure: found._asdict()},
        "temporary_bytes": timed.temporary_bytes,
        "rounds": len(times),
    }


def _table(lines: list[dict[str, Any]], rounds: int) -> Table:
    (measure,) = lines[0]["ratio"]
    rows = [
        (
            line["contender"],
            *(f"{line['seconds'][which] * 1e3:.0f}" for which in ("median", "fastest")),
            f"{line['ratio'][measure]['median']:.2f}",
            "–" if line["temporary_bytes"] is None else f"{line['temporary_bytes'] / 1e6:,.1f}",
        )
        for line in lines
    ]
    caption = (
        f"Medians of {rounds} rounds in turns; the ratio is that of the times of one round, to {measure}. Temporary MB "
        "are what a pass needs at once beyond its arguments and outputs"
    )
    uncounted = any(line["temporary_bytes"] is None for line in lines)
    columns = ("", "ms", "fastest", "ratio", "temporary MB")
    return Table(columns, rows, caption + ("; torch's are not counted on CPU." if uncounted else "."))


def _machine() -> dict[str, Any]:
    """On what it ran."""
    found = facts(kernel)
    return {**found, "versions": {**found["versions"], **peer_versions()}}
