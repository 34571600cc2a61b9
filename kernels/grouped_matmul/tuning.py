"""Find the fastest tiles on the GPU that is here, and write them to the table of its kind: `tuned.py` reads it.

Every candidate's result is checked in float64 before it is timed, all in turns; one that is wrong is an error, one that
does not compile or run is passed over and told. Letters: M rows, D inner width, F output width, E groups.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..measuring import Call, in_turns
from .bench import pass_of_product
from .cases import Case
from .operands import Numbers, Operands, checked_columns, in_float64, operands
from .passes import Pass, pass_of
from .tuned import FOLDER, Key, table_file, write_rows


class Tunable(NamedTuple):
    """An implementation whose tiles can be chosen."""

    candidates: Callable[[Pass], Iterable[Any]]
    """Tiles, a rule's choice first."""
    multiply: Callable[..., jax.Array]
    """Of x, w, group sizes and tiles."""
    packed: bool = True
    """Whether its tiles for packed matrices can be chosen, too."""


class Tuned(NamedTuple):
    """What was found for a pass."""

    name: str
    """Case, pass and numbers."""
    key: Key
    tiles: Any
    """The fastest."""
    gain: float | None
    """So many times faster than the rule's choice, 1 where that is the fastest; None: the rule's does not run."""
    tried: int
    failed: tuple[str, ...]
    """What did not compile or run, with its first line."""


def tunables() -> dict[str, Tunable]:
    """Those for GPUs."""
    from .mosaic_gpu_kernels import walk
    from .mosaic_gpu_kernels.calls import grouped_matmul_mosaic_gpu
    from .triton_kernels import tiles
    from .triton_kernels.calls import grouped_matmul_triton

    return {
        "triton": Tunable(tiles.candidates, grouped_matmul_triton),
        "mosaic_gpu": Tunable(walk.candidates, grouped_matmul_mosaic_gpu, packed=False),
    }


def tune(cases: Iterable[Case], rounds: int, among: dict[str, Tunable] | None = None) -> Iterator[Tuned]:
    """Every pass of the cases over all of their numbers, one after the other.

    Args:
        cases: what is tuned for.
        rounds: how often each candidate is timed; the median counts.
        among: implementations by name; None: all.

    Raises:
        ArithmeticError: a candidate's result is wrong.
    """
    for case in cases:
        for which in case.passes:
            for numbers in case.numbers(which):
                given = operands(numbers, case.shape, case.sizes)
                for name, tunable in (tunables() if among is None else among).items():
                    if tunable.packed or numbers.weights is None:
                        yield _tune(name, tunable, case, which, numbers, given, rounds)


def write_table(found: Iterable[Tuned], file: Path | None = None) -> Path:
    """Put what was found into a table; None: that of the device that is here, where the package is."""
    file = table_file(jax.devices()[0].device_kind, FOLDER) if file is None else file
    versions = {name: importlib.metadata.version(name) for name in ("jax", "triton") if _installed(name)}
    write_rows(file, {tuned.key: tuned.tiles._asdict() for tuned in found}, versions)
    return file


def _tune(name: str, tunable: Tunable, case: Case, which: str, numbers: Numbers, given: Operands, rounds: int) -> Tuned:
    work = pass_of(which, given.x, given.w, given.dy)
    columns = checked_columns(which, case.shape)
    expected = in_float64(which, given, case.sizes, columns)
    calls, failed = {}, []
    first = None
    for tiles in tunable.candidates(work):
        first = first or tiles
        run = jax.jit(pass_of_product(lambda x, w, sizes, tiles=tiles: tunable.multiply(x, w, sizes, tiles), which))
        call = Call(lambda run=run: run(*given))
        try:
            result = np.asarray(call()[..., columns], np.float64)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failed.append(f"{tuple(tiles)}: {reason[:120]}")
            continue
        error = np.abs(result - expected).max() / np.abs(expected).max()
        if not error <= numbers.allowed:
            raise ArithmeticError(
                f"{case}, {which}, {numbers.name}: {name} with {tiles} is wrong by {error:.1e}, allowed is "
                f"{numbers.allowed:.0e}"
            )
        calls[tiles] = call
    if not calls:
        raise RuntimeError(f"{case}, {which}, {numbers.name}: no tiles of {name} run here: {failed[0]}")
    medians = {tiles: float(np.median(seconds)) for tiles, seconds in in_turns(calls, rounds).items()}
    best = min(medians, key=lambda tiles: medians[tiles])
    gain = medians[first] / medians[best] if first in medians else None
    label = f"{case}, {which}, {numbers.name}: {name}"
    return Tuned(label, Key.of(name, work), best, gain, len(calls), tuple(failed))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
