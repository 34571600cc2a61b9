"""What this machine can do at most, measured: products of dense matrices, and copies."""

import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .measuring import Call, in_turns

ROUNDS = 8


class Ceilings(NamedTuple):
    """The best of JAX and, on CPU, torch."""

    flops: dict[str, float]
    """Operations per second of one large product, by dtype."""
    bytes: float
    """Per second, read and written, by a large copy."""

    def __str__(self) -> str:
        products = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.flops.items())
        return f"ceilings measured here: {products}; copy {self.bytes / 1e9:,.1f} GB/s (less than from a cache)"


def measure_ceilings(dtypes: Iterable[str], side: int | None = None) -> Ceilings:
    """Time one product of square matrices for each dtype and a copy of as many bytes as 16 float32 matrices.

    Args:
        dtypes: "float32", "bfloat16" or "int8", whose products are summed in int32.
        side: of the matrices; None: as large as takes well under a second.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    flops = {dtype: 2 * side**3 / _fastest(_products(dtype, side)) for dtype in dict.fromkeys(dtypes)}
    return Ceilings(flops, 2 * 4 * 16 * side**2 / _fastest(_copies(16 * side**2)))


def _fastest(calls: Iterator[Call]) -> float:
    contenders = dict(enumerate(calls))
    for call in contenders.values():
        call()
    return min(float(seconds.min()) for seconds in in_turns(contenders, ROUNDS).values())


def _products(dtype: str, side: int) -> Iterator[Call]:
    one = jnp.ones((side, side), dtype)
    sums = jnp.int32 if dtype == "int8" else None
    product = jax.jit(lambda one: jax.lax.dot(one, one, preferred_element_type=sums))
    yield Call(lambda: product(one))
    if dtype != "int8" and _torch_on_cpu():
        import torch  # pyright: ignore[reportMissingImports]

        matrix = torch.ones(side, side, dtype=getattr(torch, dtype))
        yield Call(lambda: matrix @ matrix, lambda _: None)


def _copies(elements: int) -> Iterator[Call]:
    # In place: new memory has to be got from the system first, which can take longer than the copy.
    negate = jax.jit(lambda array: -array, donate_argnums=0)
    array = jnp.ones(elements, jnp.float32)

    def in_place() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    yield Call(in_place)
    if _torch_on_cpu():
        import torch  # pyright: ignore[reportMissingImports]

        source, target = torch.ones(elements), torch.empty(elements)
        yield Call(lambda: target.copy_(source), lambda _: None)


def _torch_on_cpu() -> bool:
    return jax.default_backend() == "cpu" and importlib.util.find_spec("torch") is not None
