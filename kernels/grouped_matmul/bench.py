"""What a grouped matmul costs within one process: implementations and peers, after a check of their results.

Letters: M rows, D inner width, F output width, E groups. The shapes are those of `cases.py`, the numbers those of
`operands.py`, the peers those of `peers.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..ceilings import Ceilings, measure_ceilings
from ..implementations import OTHER
from ..measuring import Call, Check, Contender, in_turns
from .api import IMPLEMENTATIONS, PREFERRED, grouped_matmul
from .cases import PASSES, Case, cases
from .operands import Numbers, Operands, checked_columns, in_float64, matrices, numbers_here, operands
from .peers import absent, available, versions

__all__ = ["CASE", "PASSES", "cases", "ceilings", "checks", "names", "notes", "rates", "seconds", "versions"]

CASE = "case: M x D x F, E"
"""What a case's name says."""
AFFORDABLE = {"cpu": 3e9, "gpu": 1e14, "tpu": 1e14}
"""Floating-point operations of every row with every group, above which what costs so much is left out."""
COSTS_TIMES_E = {"cpu": ("xla", "reference"), "gpu": ("xla", "reference"), "tpu": ("reference",)}
MADE_FOR = {"native": "cpu", "blocked": "cpu", "mosaic_tpu": "tpu", "mosaic_gpu": "gpu", "triton": "gpu"}
"""The platform of an implementation that is not for all."""


def implementations(platform: str) -> tuple[str, ...]:
    """Those of ours that are for a platform."""
    return tuple(name for name in IMPLEMENTATIONS if MADE_FOR.get(name, platform) == platform)


def names() -> tuple[str, ...]:
    """Of what is timed, without its numbers: ours, then the peers, whose first is the measure."""
    return (*(name for name in implementations(jax.default_backend()) if name != "reference"), *available())


def notes(cases: list[Case]) -> Iterator[str]:
    """What is left out of all cases, and why."""
    platform = jax.default_backend()
    for name, reason in absent().items():
        yield f"{name} is left out: {reason}"
    for name, other in MADE_FOR.items():
        if other != platform:
            yield f"{name} is left out: it is for {other}"
    if "torch" not in available():
        yield "times are multiples of one dense product by JAX"
    costly = " and ".join(COSTS_TIMES_E[platform])
    yield f"{costly}: over {numbers_here()[0].name} alone"
    if any(_too_dear(name, case) for case in cases for name in COSTS_TIMES_E[platform]):
        yield f"{costly} do E times the work here: they are left out above {AFFORDABLE[platform]:.0e} FLOPs of it"
    if platform != "cpu":
        yield f"float32 is left out on {platform}: its units may round it to fewer bits"


def ceilings() -> Ceilings:
    """For the numbers that are used here."""
    return measure_ceilings(numbers.unit for numbers in numbers_here())


def checks(case: Case) -> Iterator[Check]:
    """What every contender's result is worth.

    Over other numbers than the main ones, the first of the implementations that the platform prefers is enough.
    """
    preferred = PREFERRED.get(jax.default_backend(), PREFERRED[OTHER])
    for which in case.passes:
        columns = checked_columns(which, case.shape)
        for numbers in case.numbers(which):
            given, expected, chosen = _operands(numbers, case), None, False
            for contender in _contenders(case, numbers):
                if chosen and contender.name in preferred:
                    continue
                if contender.peer and not available()[contender.name].grouped:
                    yield Check(contender, which, None, numbers.allowed)
                    continue
                try:
                    found = _columns(_call(contender, which, numbers, case, given)(), columns)
                except Exception as error:
                    if not _may_fail(contender, error):
                        raise
                    yield Check(contender, which, None, numbers.allowed, refusal=_first_line(error))
                    continue
                chosen |= not contender.main and contender.name in preferred
                if expected is None:
                    expected = in_float64(which, given, case.sizes, columns)
                error = np.abs(found - expected).max() / np.abs(expected).max()
                yield Check(contender, which, float(error) if np.isfinite(error) else float("inf"), numbers.allowed)


def seconds(
    case: Case, which: str, wanted: Sequence[Contender], rounds: int
) -> tuple[dict[Contender, np.ndarray], list[Check]]:
    """The seconds in every round of what `checks` found right, and what failed after all, with its reason."""
    calls, failed = {}, []
    for numbers in case.numbers(which):
        given = _operands(numbers, case)
        for contender in _contenders(case, numbers):
            if contender not in wanted or contender.name == "reference":
                continue
            try:
                call = _call(contender, which, numbers, case, given)
                call()  # compiles
                calls[contender] = call
            except Exception as error:
                if not _may_fail(contender, error):
                    raise
                failed.append(Check(contender, which, None, numbers.allowed, refusal=_first_line(error)))
    return in_turns(calls, rounds), failed


def rates(
    case: Case, which: str, contender: Contender, seconds: float, ceilings: Ceilings | None
) -> dict[str, float | str | None]:
    """What so many seconds are: operations or, in decoding, bytes of the groups' matrices in a second, and of what the
    machine can do.

    The dense product, which reads one matrix, is always judged by its operations.
    """
    numbers = _numbers_of(contender, case, which)
    if case.decodes and contender.name != "dense":
        w = matrices(numbers, len(case.sizes), case.shape.inner, case.shape.width)
        rate, limit, unit = w.nbytes * np.mean(case.sizes > 0) / seconds, ceilings and ceilings.bytes, "GB/s of weights"
    else:
        rate, limit, unit = case.flops / seconds, ceilings and ceilings.flops[numbers.unit], "GFLOP/s"
    percent = None if limit is None else float(100 * rate / limit)
    return {"rate": float(rate / 1e9), "unit": unit, "percent_of_ceiling": percent}


@functools.cache
def compiled_pass(name: str, which: str) -> Callable[..., jax.Array]:
    """An implementation's forward, dx or dw, as a function of x, w, sizes and dy."""

    return jax.jit(pass_of_product(lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation=name), which))


def pass_of_product(product_of: Callable[..., jax.Array], which: str) -> Callable[..., jax.Array]:
    """The forward, dx or dw of a grouped matmul, as a function of x, w, sizes and dy."""

    def run(x, w, sizes, dy):
        def product(x, w):
            return product_of(x, w, sizes)

        # Of both gradients, the compiler leaves out the one that is not asked for.
        return product(x, w) if which == "forward" else jax.vjp(product, x, w)[1](dy)[("dx", "dw").index(which)]

    return run


def _too_dear(name: str, case: Case) -> bool:
    platform = jax.default_backend()
    return name in COSTS_TIMES_E[platform] and case.flops * len(case.sizes) > AFFORDABLE[platform]


def _contenders(case: Case, numbers: Numbers) -> Iterator[Contender]:
    main = numbers == numbers_here()[0]
    for name in implementations(jax.default_backend()):
        if not _too_dear(name, case) and (main or name not in COSTS_TIMES_E[jax.default_backend()]):
            yield Contender(name, numbers.name, main)
    if numbers.weights is None:
        for name in available():
            yield Contender(name, numbers.name, main, peer=True)


def _numbers_of(contender: Contender, case: Case, which: str) -> Numbers:
    return next(numbers for numbers in case.numbers(which) if numbers.name == contender.numbers)


def _call(contender: Contender, which: str, numbers: Numbers, case: Case, given: Operands) -> Call:
    if contender.peer:
        return available()[contender.name].call(which, numbers, given, case.shape)
    return Call(lambda: compiled_pass(contender.name, which)(*given))


def _operands(numbers: Numbers, case: Case) -> Operands:
    return operands(numbers, case.shape, case.sizes)


def _columns(result: Any, columns: np.ndarray) -> np.ndarray:
    taken = result if result.shape[-1] == len(columns) else result[..., columns]
    return np.asarray(taken.double().cpu() if hasattr(taken, "cpu") else taken, np.float64)


def _may_fail(contender: Contender, error: Exception) -> bool:
    """Whether to say so and go on: a peer's affair, a limit of an implementation of ours, or too little memory."""
    return contender.peer or isinstance(error, NotImplementedError) or "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
