"""FLOPs counted from a jaxpr, against counts by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from dynamoe.kernels.flops import Counted, KernelCall, count_flops
from dynamoe.kernels.grouped_matmul import grouped_matmul

A, B = jnp.ones((4, 6)), jnp.ones((6, 5))
PRODUCT = 2 * 4 * 6 * 5


def counted(function: Callable[..., Any], *arguments: Any) -> Counted:
    return count_flops(jax.make_jaxpr(function)(*arguments))


def test_a_product_is_two_operations_for_each_multiplication():
    assert counted(jnp.matmul, A, B).flops == PRODUCT
    assert (
        counted(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), jnp.ones((3, 4, 6)), jnp.ones((3, 6, 5))).flops
        == 360 * 2
    )
    assert counted(lambda a: jnp.sin(a) + a, A).flops == 0


def test_backward_is_twice_forward():
    assert counted(jax.grad(lambda a, b: jnp.sum(a @ b), (0, 1)), A, B).flops == 3 * PRODUCT


def test_a_scan_counts_each_turn_and_a_branch_the_largest():
    def turns(a, b):
        return jax.lax.scan(lambda carry, _: (carry, carry @ b), a, None, length=7)[1]

    assert counted(jax.jit(jax.checkpoint(turns)), A, B).flops == 7 * PRODUCT
    assert (
        counted(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b)[:2], lambda: a[:2] @ b), A, B).flops == PRODUCT
    )


def test_a_loop_of_unknown_length_is_not_known_unless_it_multiplies_nothing():
    def loop(a, b):
        return jax.lax.while_loop(lambda a: jnp.sum(a) < 0, lambda a: a + jnp.sum(a @ b), a)

    assert counted(loop, A, B).flops is None
    assert counted(lambda a: jax.lax.while_loop(lambda a: jnp.sum(a) < 0, lambda a: a + 1, a), A).flops == 0


def test_a_ragged_product_counts_each_row_once():
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 4, 3])
    forward = 2 * 8 * 4 * 5
    assert counted(jax.lax.ragged_dot, x, w, sizes).flops == forward
    both = jax.grad(lambda x, w: jnp.sum(jax.lax.ragged_dot(x, w, sizes)), (0, 1))
    assert counted(both, x, w).flops == 3 * forward


def test_a_convolution_counts_its_window():
    image, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 2, 2))
    assert counted(lambda i, k: jax.lax.conv(i, k, (2, 2), "VALID"), image, kernel).flops == 2 * (2 * 5 * 4 * 4) * 3 * 4


def test_ragged_products_are_also_counted_alone():
    rows, weights, sizes = jnp.ones((6, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 3])

    def both(rows, weights, sizes):
        products = [jax.lax.ragged_dot(rows, weights, sizes) for _ in range(2)]
        return products[0] + products[1] + rows @ weights[0]

    found = counted(both, rows, weights, sizes)
    assert (found.flops, found.ragged) == (3 * 2 * 6 * 4 * 5, 2 * 2 * 6 * 4 * 5)


def test_products_in_our_own_code_count_as_any():
    rows, weights, sizes = jnp.ones((6, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 3])

    def product(rows, weights):
        return grouped_matmul(rows, weights, sizes, implementation="native").sum()

    assert counted(product, rows, weights).flops == 2 * 6 * 4 * 5
    assert counted(jax.grad(product, argnums=(0, 1)), rows, weights).flops == 3 * 2 * 6 * 4 * 5


def test_each_device_of_a_shard_map_counts():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data")
    )
    assert counted(split, A, B).flops == PRODUCT


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_kernel_counts_its_body_at_each_step_of_its_grid(dynamic):
    def multiply(a, b, c):
        @pl.when(pl.program_id(0) > 0)
        def _():
            c[...] = a[...] @ b[...]

    def call(a, b, steps):
        spec = pl.BlockSpec((4, 5), lambda i, j: (0, 0))
        shape = jax.ShapeDtypeStruct((4, 5), jnp.float32)
        whole = [pl.BlockSpec(array.shape, lambda i, j: (0, 0)) for array in (a, b)]
        return pl.pallas_call(multiply, shape, grid=(3, steps), in_specs=whole, out_specs=spec, name="mine")(a, b)

    if dynamic:
        assert counted(call, A, B, jnp.int32(2)) == Counted(None, (KernelCall("mine", None, None),), 0.0)
    else:
        found = counted(lambda a, b: call(a, b, 2), A, B)
        assert found == Counted(6 * PRODUCT, (KernelCall("mine", (3, 2), 6 * PRODUCT),), 0.0)
        assert found.kernels[0].steps == 6
