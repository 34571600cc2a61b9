"""What a token permutation costs, as ratios within one process: implementations and peers, after a check of results.

Letters: T tokens, D width, K experts per token, A assignments, M rows, E experts.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..measuring import Call, Check, Contender, in_turns
from .api import PERMUTES, SORTS, permute, sort_by_expert, unpermute
from .permutation import Permutation
from .shapes import MODELS, MOVED, SORTED, Shape, drawn_experts

CASE = "case: model, A, E, D"
"""What a case's name says."""
IMPLEMENTATIONS = tuple(SORTS)
"""Of the sort; some of them also move tokens."""
MOVES = ("permute", "unpermute", "dx", "drows")
PASSES = ("sort", *MOVES)
ALLOWED_ERROR = 1e-5
"""Of the largest element, in float32. A sort is right or infinitely wrong."""


class Case(NamedTuple):
    """One sort, or tokens moved there and back."""

    kind: str
    """"sort" or "move"."""
    model: str
    shape: Shape
    expert: np.ndarray

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:1] if self.kind == "sort" else MOVES

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(SORTS if self.kind == "sort" else PERMUTES)

    def __str__(self) -> str:
        """Kind, model, A, E, D."""
        return f"{self.kind} {self.model} {len(self.expert)} {self.shape.experts} {self.shape.width}"


class Operands(NamedTuple):
    """What the passes take."""

    expert: np.ndarray
    permutation: Permutation
    x: np.ndarray
    rows: np.ndarray
    weight: np.ndarray
    dy: np.ndarray


def cases(quick: bool) -> tuple[list[Case], list[str]]:
    """What is measured; with `quick`, some of it. Nothing is left out."""
    found = []
    for kind, counts in (("sort", SORTED[:1] if quick else SORTED), ("move", (MOVED,))):
        for model, shape in list(MODELS.items())[: 2 if quick else None]:
            found += [Case(kind, model, shape, drawn_experts(shape, count)) for count in counts]
    return found, []


def notes(_: list[Case]) -> Iterator[str]:
    """What a reader might miss in the tables, and why."""
    if "torch" not in peers():
        yield "torch is not installed: times are multiples of plain JAX: a stable argsort, indexing, a scatter"


def names() -> tuple[str, ...]:
    """Of what is timed: ours, then the peers, whose first is the measure."""
    return (*(name for name in IMPLEMENTATIONS if name != "reference"), *peers())


def peers() -> tuple[str, ...]:
    """What our implementations are measured against, the first being the measure: torch where it is installed."""
    return ("torch", "jax") if importlib.util.find_spec("torch") else ("jax",)


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {name: importlib.metadata.version(name) for name in peers()}


def ceilings() -> None:
    """Nothing that a machine's ceiling would say much about."""


def rates(*_: object) -> dict[str, float | str | None]:
    """As little as of ceilings."""
    return {}


def checks(case: Case) -> Iterator[Check]:
    """What every implementation's result is worth."""
    operands = _operands(case)
    for which in case.passes:
        expected = _in_float64(which, case, operands)
        for name in case.implementations:
            found = _placed(compiled_pass(name, which, case.shape.experts), *operands)()
            yield Check(Contender(name), which, _error(jax.tree.leaves(found), expected), ALLOWED_ERROR)
        for name in peers():
            yield Check(Contender(name, peer=True), which, None, ALLOWED_ERROR)


def seconds(
    case: Case, which: str, wanted: Sequence[Contender], rounds: int
) -> tuple[dict[Contender, np.ndarray], list[Check]]:
    """The seconds in every round of those contenders, and what failed, which nothing does."""
    operands = _operands(case)
    peer_calls = {"torch": _torch, "jax": _jax}
    calls = {}
    for contender in wanted:
        if contender.peer:
            calls[contender] = peer_calls[contender.name](which, case, operands)
        elif contender.name != "reference":
            calls[contender] = _placed(compiled_pass(contender.name, which, case.shape.experts), *operands)
    for call in calls.values():
        call()  # compiles
    return in_turns(calls, rounds), []


def _operands(case: Case) -> Operands:
    expert, (experts, per_token, width) = case.expert, case.shape
    count, random = len(expert), np.random.default_rng(0)
    order = np.argsort(expert, kind="stable").astype(np.int32)
    row = np.empty_like(order)
    row[order] = np.arange(count)
    sizes = np.bincount(expert, minlength=experts + 1)[:experts].astype(np.int32)
    assignment = np.where(np.arange(count) < sizes.sum(), order, count).astype(np.int32)
    row = np.where(expert < experts, row, count).astype(np.int32)
    permutation = Permutation(row, assignment, sizes)  # pyright: ignore[reportArgumentType]
    width = 1 if case.kind == "sort" else width  # which it does not look at
    x, rows, weight, dy = (
        random.standard_normal(shape, np.float32)
        for shape in ((count // per_token, width), (count, width), (count,), (count // per_token, width))
    )
    return Operands(expert, permutation, x, rows, weight, dy)


def _in_float64(which: str, case: Case, operands: Operands) -> list[np.ndarray]:
    if which == "sort":
        return [np.asarray(array) for array in operands.permutation]
    (row, assignment, _), count = operands.permutation, len(case.expert)
    token_of_row = np.append(np.arange(count) // case.shape.per_token, 0)[assignment]
    taken = (assignment < count)[:, None]
    of_row = operands.x[token_of_row], operands.rows, operands.dy[token_of_row]
    x, rows, dy = (np.where(taken, array, 0.0) for array in of_row)
    weight = np.append(operands.weight, 0.0)[assignment][:, None]
    if which == "permute":
        return [x]
    if which == "drows":
        to_weight = np.append((rows * dy).sum(axis=1), 0.0)
        return [dy * weight, to_weight[row]]
    total = np.zeros(operands.x.shape)
    np.add.at(total, token_of_row, rows * weight if which == "unpermute" else rows)
    return [total]


def _error(found: list[jax.Array], expected: list[np.ndarray]) -> float:
    if np.issubdtype(expected[0].dtype, np.integer):
        return 0.0 if all(map(np.array_equal, found, expected)) else float("inf")
    pairs = zip(found, expected, strict=True)
    worst = max(np.abs(np.asarray(one) - other).max() / np.abs(other).max() for one, other in pairs)
    return float(worst) if np.isfinite(worst) else float("inf")


@functools.cache
def compiled_pass(name: str, which: str, experts: int) -> Callable[..., object]:
    """An implementation's sort, move or gradient, as a function of `Operands`."""

    def run(expert, permutation, x, rows, weight, dy):
        def there(x):
            return permute(x, permutation, implementation=name)

        def back(rows, weight):
            return unpermute(rows, weight, permutation, tokens=x.shape[0], implementation=name)

        calls = {
            "sort": lambda: sort_by_expert(expert, experts, implementation=name),
            "permute": lambda: there(x),
            "unpermute": lambda: back(rows, weight),
            "dx": lambda: jax.vjp(there, x)[1](rows)[0],
            "drows": lambda: jax.vjp(back, rows, weight)[1](dy),
        }
        return calls[which]()

    return jax.jit(run)


def _placed(function: Callable[..., object], *arguments: np.ndarray | Permutation) -> Call:
    placed = jax.tree.map(jnp.asarray, arguments)
    return Call(lambda: function(*placed))


def _jax(which: str, case: Case, operands: Operands) -> Call:
    """What one writes without a kernel: a stable argsort, indexing, and JAX's own gradients. Padding has rows too."""
    per_token = case.shape.per_token

    order = np.argsort(operands.expert, kind="stable").astype(np.int32)

    def run(order, expert, permutation, x, rows, weight, dy):
        def there(x):
            return x[order // per_token]

        def back(rows, weight):
            return jnp.zeros_like(x).at[order // per_token].add(rows * weight[order][:, None])

        calls = {
            "sort": lambda: (jnp.argsort(expert, stable=True), jnp.bincount(expert, length=case.shape.experts)),
            "permute": lambda: there(x),
            "unpermute": lambda: back(rows, weight),
            "dx": lambda: jax.vjp(there, x)[1](rows)[0],
            "drows": lambda: jax.vjp(back, rows, weight)[1](dy),
        }
        return calls[which]()

    return _placed(jax.jit(run), order, *operands)


def _torch(which: str, case: Case, operands: Operands) -> Call:
    """`torch.sort`, `index_select` and `index_add`, and the products that their gradients are."""
    import torch  # pyright: ignore[reportMissingImports]

    expert, x, rows, weight, dy = map(torch.from_numpy, (operands.expert, *operands[2:]))
    order = torch.from_numpy(np.argsort(operands.expert, kind="stable"))
    token = order // case.shape.per_token

    def drows():
        of_row = dy[token]
        return of_row * weight[order][:, None], torch.zeros_like(weight).index_copy(0, order, (rows * of_row).sum(1))

    calls = {
        "sort": lambda: (torch.sort(expert, stable=True), torch.bincount(expert, minlength=case.shape.experts)),
        "permute": lambda: x.index_select(0, token),
        "unpermute": lambda: torch.zeros_like(x).index_add(0, token, rows * weight[order][:, None]),
        "dx": lambda: torch.zeros_like(x).index_add(0, token, rows),
        "drows": drows,
    }
    return Call(calls[which], lambda _: None)
