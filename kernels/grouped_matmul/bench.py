"""What a grouped matmul costs, as ratios within one process: implementations and peers, after a check of their results.

Letters: M rows, D inner width, F output width, E groups.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .api import IMPLEMENTATIONS, grouped_matmul
from .shapes import (
    DATA,
    DECODE_ROWS,
    EXPERT_GROUPS,
    EXPERTS,
    LAYERS,
    Shape,
    drawn_sizes,
    even_sizes,
    routed_counts,
    scaled_sizes,
)

CASE = "case: M x D x F, E"
"""What a case's name says."""
PASSES = ("forward", "dx", "dw")
ALLOWED_ERROR = 1e-5
"""Of the largest element, in float32."""
AFFORDABLE = 2e10
"""Floating-point operations of every row with every group, above which what costs so much (on CPU) is left out."""
COSTS_TIMES_E = ("xla", "reference")

Call = Callable[[], object]


class Case(NamedTuple):
    """One grouped matmul."""

    kind: str
    """"experts", "layer" or "decode"."""
    shape: Shape
    spread: str
    """How the rows spread over the groups."""
    sizes: np.ndarray

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:1] if self.kind == "decode" else PASSES

    @property
    def implementations(self) -> tuple[str, ...]:
        affordable = 2 * float(np.prod(self.shape)) * len(self.sizes) <= AFFORDABLE
        return tuple(name for name in runnable() if affordable or name not in COSTS_TIMES_E)

    def __str__(self) -> str:
        """Kind, M x D x F, E, spread."""
        return f"{self.kind} {'x'.join(map(str, self.shape))} {len(self.sizes)} {self.spread}"


def cases(quick: bool) -> list[Case]:
    """What is measured; with `quick`, some of it."""
    counts = routed_counts()
    found = []
    for shape in EXPERTS[1:] if quick else EXPERTS:
        for groups in EXPERT_GROUPS[::3] if quick else EXPERT_GROUPS:
            found.append(Case("experts", shape, "even", even_sizes(shape.rows, groups)))
        for name, count in counts.items():
            found.append(Case("experts", shape, name, scaled_sizes(count, shape.rows)))
    for shape, groups in LAYERS[:1] if quick else LAYERS:
        found.append(Case("layer", shape, "even", even_sizes(shape.rows, groups)))
        found.append(Case("layer", shape, "skewed", scaled_sizes(1 / (1 + np.arange(groups)), shape.rows)))
    for rows in DECODE_ROWS[::3] if quick else DECODE_ROWS:
        for _, inner, width in EXPERTS[1:] if quick else EXPERTS:
            for groups in EXPERT_GROUPS[::3] if quick else EXPERT_GROUPS:
                found.append(Case("decode", Shape(rows, inner, width), "drawn", drawn_sizes(rows, groups)))
    return found


def left_out(cases: list[Case]) -> Iterator[str]:
    """What a reader might miss in the tables, and why."""
    if not routed_counts():
        yield f"{DATA} is not set: the rows with counts of OLMoE and Mixtral are left out"
    if "torch" not in peers():
        yield "torch is not installed: times are multiples of one dense product by JAX"
    if any("xla" not in case.implementations for case in cases):
        names = " and ".join(COSTS_TIMES_E)
        yield f"{names}, which cost E times too much here, are left out above {AFFORDABLE:.0e} FLOPs"


def runnable() -> tuple[str, ...]:
    """The implementations for this platform."""
    return tuple(name for name in IMPLEMENTATIONS if name != "mosaic_tpu" or jax.default_backend() == "tpu")


def peers() -> tuple[str, ...]:
    """What our implementations are measured against, the first being the measure: torch where it is installed."""
    return ("torch", "dense") if importlib.util.find_spec("torch") else ("dense",)


def errors(case: Case) -> Iterator[tuple[str, str, float]]:
    """Implementation, pass, and its largest error as a part of the largest element of the float64 result."""
    operands = _operands(case)
    expected = _in_float64(case, *operands)
    for name in case.implementations:
        for which in case.passes:
            result = np.asarray(_ours(name, which, case, *operands)(), np.float64)
            error = np.abs(result - expected[which]).max() / np.abs(expected[which]).max()
            yield name, which, float(error) if np.isfinite(error) else float("inf")


def ratios(case: Case, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """For each pass: every contender's time as a multiple of the first peer's, by name.

    In every round each contender runs twice and its second run counts: in the first, the threads of the one before may
    still be spinning. The fastest round counts, for what disturbs only ever adds.
    """
    operands = _operands(case)
    for which in case.passes:
        names = [name for name in case.implementations if name != "reference"]
        contenders = {name: _ours(name, which, case, *operands) for name in names}
        contenders |= {name: {"torch": _torch, "dense": _dense}[name](which, case, *operands) for name in peers()}
        fastest = dict.fromkeys(contenders, float("inf"))
        for call in contenders.values():
            call()  # compiles
        for _ in range(rounds):
            for name, call in contenders.items():
                call()
                start = time.perf_counter()
                call()
                fastest[name] = min(fastest[name], time.perf_counter() - start)
        yield which, {name: seconds / fastest[peers()[0]] for name, seconds in fastest.items()}


def _operands(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [M, D], w [E, D, F] and dy [M, F]."""
    rows, inner, width = case.shape
    random = np.random.default_rng(0)
    shapes = (rows, inner), (len(case.sizes), inner, width), (rows, width)
    x, w, dy = (random.standard_normal(shape, np.float32) for shape in shapes)
    return x, w, dy


def _in_float64(case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    end = 0
    for group, size in enumerate(case.sizes):
        mine = slice(end, end := end + int(size))
        matrix = w[group].astype(np.float64)
        y[mine], dx[mine], dw[group] = x[mine] @ matrix, dy[mine] @ matrix.T, x[mine].T @ dy[mine]
    return {"forward": y, "dx": dx, "dw": dw}


def _ours(name: str, which: str, case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Call:
    return _placed(compiled_pass(name, which), x, w, case.sizes, dy)


@functools.cache
def compiled_pass(name: str, which: str) -> Callable[..., jax.Array]:
    """An implementation's forward, dx or dw, as a function of x, w, sizes and dy."""

    def run(x, w, sizes, dy):
        # What a pass does not need, the compiler leaves out.
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=name), x, w)
        return {"forward": lambda: y, "dx": lambda: back(dy)[0], "dw": lambda: back(dy)[1]}[which]()

    return jax.jit(run)


def _placed(function: Callable[..., jax.Array], *arguments: np.ndarray) -> Callable[[], jax.Array]:
    placed = [jnp.asarray(argument) for argument in arguments]
    return lambda: function(*placed).block_until_ready()


def _dense(which: str, _case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Call:
    """One product of all rows with one matrix, by JAX: as many operations, no groups."""
    products = {"forward": (jnp.matmul, x, w[0]), "dx": (lambda dy, w: dy @ w.T, dy, w[0])}
    function, *arguments = products.get(which, (lambda x, dy: x.T @ dy, x, dy))
    return _placed(jax.jit(function), *arguments)


def _torch(which: str, case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Call:
    """`torch.nn.functional.grouped_mm`, as its own autograd calls it."""
    import torch  # pyright: ignore[reportMissingImports]

    rows, matrices, gradients = (torch.from_numpy(array) for array in (x, w, dy))
    ends = torch.from_numpy(np.cumsum(case.sizes, dtype=np.int32))
    product = torch.nn.functional.grouped_mm
    calls = {
        "forward": lambda: product(rows, matrices, offs=ends),
        "dx": lambda: product(gradients, matrices.transpose(1, 2), offs=ends),
        "dw": lambda: product(rows.T, gradients, offs=ends),
    }
    return calls[which]
