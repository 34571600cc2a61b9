"""Tokens gathered on load and rows scattered on store, in Triton's interpreter, against loops in float64."""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.kernels import gather_matmul, matmul_combine, sort_by_expert
from dynamoe.kernels.quantized import INT8, quantize
from dynamoe.moe import DenseDispatcher, FusedDispatcher, MoE, SwiGLU, TopK

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1: make test-parity"),
]

spec = importlib.util.spec_from_file_location("test_token_matmul", Path(__file__).with_name("test_token_matmul.py"))
assert spec is not None and spec.loader is not None
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float16, 4e-3), (jnp.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_loops(dtype, tolerance):
    contract.assert_right("triton", dtype, tolerance)


def test_tokens_with_any_number_of_assignments_are_right():
    contract.assert_right("triton", token_major=False)


def test_rows_that_are_kept_empty_count_for_nothing():
    contract.assert_right("triton", capacity=12)


def test_strangers_among_tokens_and_rows_are_nobodys():
    given, permutation = contract.operands(), sort_by_expert(contract.routed(), contract.EXPERTS)

    @jax.jit
    def run(token: jax.Array, assignment: jax.Array) -> tuple[jax.Array, jax.Array]:
        strange = permutation._replace(assignment=assignment)
        rows = gather_matmul(given.x, given.up, permutation, token, implementation="triton")
        ones = jnp.ones((contract.ASSIGNMENTS, contract.HIDDEN))
        y = matmul_combine(ones, given.down, given.weight, strange, tokens=contract.TOKENS, implementation="triton")
        return rows, y

    token = jnp.arange(contract.ASSIGNMENTS) // contract.CHOSEN
    rows, _ = run(token.at[4].set(-1), permutation.assignment)
    assert not rows[permutation.row[4]].any() and bool(jnp.isfinite(rows).all())
    _, y = run(token, permutation.assignment.at[7].set(-3))
    assert bool(jnp.isfinite(y[jnp.arange(contract.TOKENS) != permutation.assignment[7] // contract.CHOSEN]).all())


def test_group_sizes_that_break_their_bounds_are_marked():
    given, permutation = contract.operands(), sort_by_expert(contract.routed(), contract.EXPERTS)
    broken = permutation._replace(group_sizes=permutation.group_sizes.at[0].add(100))
    run = jax.jit(lambda places: gather_matmul(given.x, given.up, places, implementation="triton"))
    assert bool(jnp.isnan(run(broken)[0, 0])) and bool(jnp.isfinite(run(permutation)).all())


def test_packed_matrices_are_refused_by_name():
    given, permutation = contract.operands(), sort_by_expert(contract.routed(), contract.EXPERTS)
    with pytest.raises(NotImplementedError, match="w is packed as int8; triton moves tokens with plain matrices alone"):
        gather_matmul(given.x, quantize(given.up, INT8), permutation, implementation="triton")


def test_a_whole_layer_is_every_expert_on_every_token():
    layers = [
        MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=6), dispatcher=dispatcher).build(
            width=8, key=jax.random.key(0)
        )
        for dispatcher in (FusedDispatcher(implementation="triton"), DenseDispatcher())
    ]
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))
    found, expected = (
        nnx.value_and_grad(lambda layer, x: (layer(x)[0] ** 2).sum(), argnums=(0, 1))(layer, x) for layer in layers
    )
    for ours, oracle in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)
