"""Floating-point operations of matrix products, counted from a jaxpr with the lengths of its loops.

What a compiler says is not used: XLA counts a loop's body once, and echoes what a Pallas call declares of itself.
A product of integers counts as well. Elementwise work does not.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class KernelCall(NamedTuple):
    """One call of a Pallas or Triton kernel, as the jaxpr has it; in a loop, one turn."""

    name: str
    grid: tuple[int, ...] | None
    """None where a part of it is known at run time alone."""
    flops: float | None
    identity: bytes = b""
    """Of a Triton kernel: equal calls have equal ones."""

    @property
    def steps(self) -> int | None:
        return None if self.grid is None else math.prod(self.grid)


class Counted(NamedTuple):
    flops: float | None
    """Over all devices; None where a loop's length is known at run time alone and its body multiplies matrices."""
    kernels: tuple[KernelCall, ...]
    ragged: float | None = 0.0
    """Of those, the ones of ragged products, as if all rows belonged to a group."""


def count_flops(jaxpr: ClosedJaxpr) -> Counted:
    """Count a jaxpr's products: of a branch the largest, of a kernel those of its body at every step of its grid.

    A kernel that skips steps, as the grouped matmul does those of left over visits, is counted as if it did not: the
    count is a bound for any data.
    """
    kernels: list[KernelCall] = []
    return Counted(_flops(jaxpr.jaxpr, kernels), tuple(kernels), _flops(jaxpr.jaxpr, [], ragged_alone=True))


def _flops(jaxpr: Jaxpr, kernels: list[KernelCall], ragged_alone: bool = False) -> float | None:
    return _sum(_flops_of(equation, kernels, ragged_alone) for equation in jaxpr.eqns)


def _flops_of(equation: JaxprEqn, kernels: list[KernelCall], ragged_alone: bool) -> float | None:
    name, parameters = equation.primitive.name, equation.params
    if ragged_alone and name in ("dot_general", "conv_general_dilated", "pallas_call"):
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "ragged_dot_general":
        return _ragged_dot(equation)
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) / kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(_shape(equation.outvars[0])) * per_output
    if name == "pallas_call":
        return _kernel(equation, kernels)
    if name == "ffi_call":
        return _native(equation)
    if name == "triton_kernel_call":
        return _triton(equation, kernels)
    if name == "mpmd_map":
        return _mosaic_gpu(equation, kernels)
    if name == "cond":
        branches = [_flops(branch.jaxpr, kernels, ragged_alone) for branch in parameters["branches"]]
        return None if None in branches else max(found for found in branches if found is not None)
    inner = _sum(_flops(body, kernels, ragged_alone) for body in _bodies(parameters.values()))
    if name == "scan":
        return _times(inner, parameters["length"])
    if name == "while":
        return _times(inner, None)
    if name == "shard_map":
        return _times(inner, math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"]))
    return inner


def _ragged_dot(equation: JaxprEqn) -> float:
    """Each row is multiplied with one group's matrix, or, where rows are summed over, adds to one group's."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    products = math.prod(out) * math.prod(left[axis] for axis in contracted)
    summed = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return 2.0 * (products / _shape(equation.invars[2])[-1] if summed else products)


def _native(equation: JaxprEqn) -> float | None:
    """Our own C++ on CPU: each row is multiplied with one group's matrix, or adds to one group's."""
    name, left, out = equation.params["target_name"], _shape(equation.invars[0]), _shape(equation.outvars[0])
    if name == "dynamoe_gradient_of_matrices":
        return 2.0 * math.prod(left) * out[-1]
    return 2.0 * math.prod(out) * left[-1] if name.startswith("dynamoe_rows_times") else None


def _triton(equation: JaxprEqn, kernels: list[KernelCall]) -> float | None:
    """Our own Triton kernels, from what they are compiled for; programs share their tiles among each other."""
    parameters = equation.params
    constants = parameters.get("metaparams", parameters)  # of jax-triton 0.4, and 0.3
    sizes = [constants[name] for name in ("ROWS", "DEPTH", "COLUMNS", "INNER", "WIDTH") if name in constants]
    found = 2.0 * math.prod(sizes) if len(sizes) == 3 else None
    grid = parameters["grid"]
    static = (grid,) if isinstance(grid, int) else None
    kernels.append(KernelCall(parameters["name"] or "kernel", static, found, parameters["serialized_metadata"]))
    return found


def _mosaic_gpu(equation: JaxprEqn, kernels: list[KernelCall]) -> float | None:
    """Our own kernels of Pallas Mosaic GPU: each row, of the first array of two axes, meets every column."""
    name, parts = equation.params["name"] or "kernel", map(_shape, equation.invars)
    rows = next((shape for shape in parts if len(shape) == 2), None)
    found = None
    if name.startswith("grouped_matmul") and rows is not None:
        found = 2.0 * math.prod(rows) * _shape(equation.outvars[0])[-1]
    kernels.append(KernelCall(name, None, found))
    return found


def _kernel(equation: JaxprEqn, kernels: list[KernelCall]) -> float | None:
    grid = equation.params["grid_mapping"].grid
    static = tuple(grid) if all(isinstance(size, int) for size in grid) else None
    body = _flops(equation.params["jaxpr"], kernels)
    found = _times(body, None if static is None else math.prod(static))
    kernels.append(KernelCall(equation.params["name"] or "kernel", static, found))
    return found


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _bodies(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)


def _sum(parts: Iterator[float | None]) -> float | None:
    found = list(parts)
    return None if None in found else sum((part for part in found if part is not None), 0.0)


def _times(flops: float | None, count: int | None) -> float | None:
    """Nothing, however often, is nothing."""
    if flops == 0:
        return 0.0
    return None if flops is None or count is None else flops * count
