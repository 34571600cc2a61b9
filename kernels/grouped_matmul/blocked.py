"""A grouped matmul in plain JAX whose cost does not grow with the number of groups; made for XLA on CPU.

A group's rows are cut into full blocks of the largest size and one tail, which goes into the smallest size that holds
it. One loop runs all full blocks and one the tails of each size, all of dynamic length: a `cond` or `switch` over sizes
inside one loop is several times slower. A tail's block may reach past its group's end; it writes only the group's own
rows. Everything is written in place. A few rows (decoding) take another way, `_few_rows_times_matrices`.

A packed w is unpacked inside the loops, a group's matrix at a time, or in decoding a few rows of each; what is known of
how w is stored is in `storage.py`.

Letters: M rows, D inner width, F output width, E groups, S block sizes. What was measured: experiments/LOG.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from ..quantized import Quantized, QuantizedRows
from .groups import group_bounds
from .storage import multiply_block, multiply_step, sliceable, step_size, take, take_matrix

FEW_ROWS = 128
"""Up to so many rows, a row reads its matrix alone; with more, a block of rows shares it."""


@jax.custom_vjp
def grouped_matmul_blocked(
    x: Float[Array, "M D"] | QuantizedRows, w: Float[Array, "E D F"] | Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other: batched loops of different lengths would be far slower."""
    few = _row_count(x) <= FEW_ROWS
    return _few_rows_times_matrices(x, w, group_sizes) if few else _forward(x, w, group_sizes)


def _row_count(x: jax.Array | QuantizedRows) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _differentiated(x, w, group_sizes):
    return grouped_matmul_blocked(x, w, group_sizes), (x, w, group_sizes)


def _gradient(residuals, dy):
    x, w, group_sizes = residuals
    dw = None if isinstance(w, Quantized) else _gradient_of_matrices(x, dy, group_sizes)
    return _gradient_of_rows(dy, w, group_sizes), dw, None


grouped_matmul_blocked.defvjp(_differentiated, _gradient)


def block_sizes(rows: int, groups: int, matrix: int) -> tuple[int, ...]:
    """The block sizes S for M rows, E groups and matrices of D * F elements, largest first.

    Powers of two from the smallest whose product outweighs a loop's turn (some 20 microseconds) to twice a group's mean
    rows, and their halfway points near the mean, where most tails lie: a size costs compile time, a tail's padding run
    time.
    """
    mean = max(rows // groups, 1)
    smallest = min(max(_power_of_two(2**20 // matrix), 16), 64)
    largest = min(max(_power_of_two(2 * mean), 64), 512)
    sizes = {smallest << shift for shift in range(10) if smallest << shift <= largest}
    sizes |= {3 * size // 4 for size in sizes if size > smallest and mean <= size <= 2 * mean}
    return tuple(sorted((size for size in sizes if size <= rows), reverse=True)) or (rows,)


def _power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`, at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


class Plan(NamedTuple):
    """Which group has blocks of which size."""

    start: Int[Array, " E"]
    """Each group's first row."""
    tail: Int[Array, " E"]
    """Each group's first row after its full blocks."""
    end: Int[Array, " E"]
    with_full: Int[Array, " E"]
    """Groups, those with full blocks first."""
    with_full_count: Int[Array, ""]
    by_tail: Int[Array, " E"]
    """Groups by the size of their tail's block, the largest first; those without a tail last."""
    tail_count: Int[Array, " S"]
    """So many groups have a tail of this size or a larger one."""


def _plan(group_sizes: Int[Array, " E"], rows: int, sizes: tuple[int, ...]) -> Plan:
    start, end = group_bounds(group_sizes, rows)
    tail = end - (end - start) % sizes[0]
    # How many sizes smaller than the largest hold the tail; one more where there is none.
    rung = sum(((end - tail <= size).astype(jnp.int32) for size in (*sizes[1:], 0)), jnp.zeros_like(tail))
    tail_count = jnp.sum(rung[None, :] <= jnp.arange(len(sizes))[:, None], axis=1, dtype=jnp.int32)
    without_full = (tail == start).astype(jnp.int32)
    with_full_count = jnp.sum(1 - without_full, dtype=jnp.int32)
    return Plan(start, tail, end, jnp.argsort(without_full), with_full_count, jnp.argsort(rung), tail_count)


def _rows_times_matrices(x, w, group_sizes, *, contract: int):
    """Multiply each group's rows with its matrix over the matrix' axis `contract`: 0 for the product, 1 for dx."""
    w = sliceable(w)
    rows, width = _row_count(x), w.shape[2 - contract]
    dtype = jnp.float32 if isinstance(x, QuantizedRows) else x.dtype
    sizes = block_sizes(rows, w.shape[0], w.shape[1] * w.shape[2])
    plan = _plan(group_sizes, rows, sizes)

    def product(start, size, matrix):
        block = jax.tree.map(lambda leaf: _slice_rows(leaf, start, size), x)
        return multiply_block(block, matrix, contract)

    def full_blocks(i, y):
        group = take(plan.with_full, i)
        matrix = take_matrix(w, group, x)  # copied or unpacked once for all its blocks
        start = take(plan.start, group)

        def full_block(j, y):
            return _write(y, product(start + j * sizes[0], sizes[0], matrix), start + j * sizes[0])

        return jax.lax.fori_loop(0, (take(plan.tail, group) - start) // sizes[0], full_block, y)

    y = jax.lax.fori_loop(0, plan.with_full_count, full_blocks, _zeros((rows, width), dtype, group_sizes))
    for size, first, last in _tails(plan, sizes):

        def tail(i, y, size=size):
            group = take(plan.by_tail, i)
            start, own = _own_rows(plan, group, size, rows)
            mixed = jnp.where(own, product(start, size, take_matrix(w, group, x)), _slice_rows(y, start, size))
            return _write(y, mixed, start)

        y = jax.lax.fori_loop(first, last, tail, y)
    return y


@sequential_vmap
def _forward(x, w, group_sizes):
    return _rows_times_matrices(x, w, group_sizes, contract=0)


@sequential_vmap
def _gradient_of_rows(dy, w, group_sizes):
    return _rows_times_matrices(dy, w, group_sizes, contract=1)


@sequential_vmap
def _gradient_of_matrices(x, dy, group_sizes):
    """Sum, for each group, the products of its rows of x with those of dy. [E, D, F]."""
    rows, groups = x.shape[0], group_sizes.shape[0]
    shape = (groups, x.shape[1], dy.shape[1])
    sizes = block_sizes(rows, groups, shape[1] * shape[2])
    plan = _plan(group_sizes, rows, sizes)

    def product(a, b):
        return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    dw = _zeros(shape, jnp.float32, group_sizes)
    for size, first, last in _tails(plan, sizes):

        def tail(i, dw, size=size):
            group = take(plan.by_tail, i)
            start, own = _own_rows(plan, group, size, rows)
            # Both, for the rows of nobody may hold NaN, and 0 * NaN is NaN.
            a, b = (jnp.where(own, _slice_rows(v, start, size), jnp.zeros((), v.dtype)) for v in (x, dy))
            return _write(dw, product(a, b)[None], group)

        dw = jax.lax.fori_loop(first, last, tail, dw)

    def full_blocks(i, dw):
        group = take(plan.with_full, i)
        start = take(plan.start, group)

        def full_block(j, dw):
            # Added in place: a sum carried beside dw would be read and written once more.
            block = product(*(_slice_rows(v, start + j * sizes[0], sizes[0]) for v in (x, dy)))
            return _write(dw, (take(dw, group) + block)[None], group)

        return jax.lax.fori_loop(0, (take(plan.tail, group) - start) // sizes[0], full_block, dw)

    return jax.lax.fori_loop(0, plan.with_full_count, full_blocks, dw).astype(x.dtype)


@sequential_vmap
def _few_rows_times_matrices(x, w, group_sizes):
    """Add up column of x times row of the group's matrix, without blocks: the gather fuses with the multiply-add."""
    row = jnp.arange(_row_count(x), dtype=jnp.int32)
    before = row[:, None] >= jnp.cumsum(group_sizes)[None, :]
    group = jnp.sum(before, axis=1, dtype=jnp.int32)
    owned, group = (group < w.shape[0])[:, None], jnp.minimum(group, w.shape[0] - 1)
    if isinstance(x, QuantizedRows):
        sums = _sum_over_steps(x.codes, w.codes, group, jnp.int32).astype(jnp.float32)
        return jnp.where(owned, sums * x.scales * w.scales[group, 0], 0.0)
    return jnp.where(owned, _sum_over_steps(x, sliceable(w), group, jnp.float32), 0.0).astype(x.dtype)


def _sum_over_steps(x, w, group, dtype):
    (rows, inner), width, step = x.shape, w.shape[2], step_size(w)

    def add_step(i, y):
        columns = jax.lax.dynamic_slice(x, (0, i * step), (rows, step), allow_negative_indices=False)
        return y + multiply_step(columns.astype(dtype), w, group, i)

    return jax.lax.fori_loop(0, inner // step, add_step, _zeros((rows, width), dtype, group))


def _tails(plan: Plan, sizes: tuple[int, ...]):
    """For each block size: the size, and from where to where its groups stand in `plan.by_tail`."""
    return [(size, plan.tail_count[i - 1] if i else 0, plan.tail_count[i]) for i, size in enumerate(sizes)]


def _own_rows(plan: Plan, group, size: int, rows: int):
    """The start of the block that holds a group's tail, and which of its rows are the group's, [size, 1]."""
    tail = take(plan.tail, group)
    start = jnp.minimum(tail, rows - size)
    row = start + jnp.arange(size, dtype=jnp.int32)
    return start, ((tail <= row) & (row < take(plan.end, group)))[:, None]


def _slice_rows(array, start, size: int):
    return jax.lax.dynamic_slice_in_dim(array, start, size, allow_negative_indices=False)


def _write(array, block, start):
    return jax.lax.dynamic_update_slice_in_dim(array, block, start, 0, allow_negative_indices=False)


def _zeros(shape: tuple[int, ...], dtype, like):
    """Zeros that vary over the mesh axes that `like` varies over: a loop under shard_map must keep its carry's type."""
    return jnp.full(shape, (0 * like[0]).astype(dtype))
