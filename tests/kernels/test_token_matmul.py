"""`gather_matmul` and `matmul_combine` against loops in float64, in value and gradient, and what they refuse."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels import Permutation, fixed_groups, gather_matmul, matmul_combine, sort_by_expert
from dynamoe.kernels.quantized import INT8, dequantize, quantize

TOKENS, CHOSEN, EXPERTS, WIDTH, HIDDEN = 20, 3, 5, 12, 7
ASSIGNMENTS = TOKENS * CHOSEN


class Operands(NamedTuple):
    x: jax.Array
    up: jax.Array
    down: jax.Array
    weight: jax.Array
    dy: jax.Array


def operands(dtype: Any = jnp.float32) -> Operands:
    random = np.random.default_rng(0)
    shapes = (TOKENS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (ASSIGNMENTS,), (TOKENS, WIDTH)
    x, up, down, weight, dy = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return Operands(x, up, down, weight.astype(jnp.float32), dy)


def routed(nobody: bool = True) -> jax.Array:
    """The expert of each assignment; some are of nobody, and expert 2 is nobody's."""
    expert = np.random.default_rng(1).integers(0, EXPERTS + nobody, ASSIGNMENTS)
    return jnp.asarray(np.where(expert == 2, 4, expert), jnp.int32)


def token_of(token_major: bool) -> jax.Array | None:
    """With `token_major` as it stands; else tokens have as many assignments as the draw gives them, one has none."""
    drawn = np.random.default_rng(2).integers(1, TOKENS, ASSIGNMENTS)
    return None if token_major else jnp.asarray(drawn, jnp.int32)


def in_loops(
    given: Operands, expert: jax.Array, permutation: Permutation, token: jax.Array | None, up: jax.Array | None = None
) -> dict[str, np.ndarray]:
    """y and the gradients of both products, one assignment after the other."""
    x, up64, down, weight, dy = (
        np.asarray(array, np.float64) for array in given._replace(up=given.up if up is None else up)
    )
    owner = np.arange(ASSIGNMENTS) // CHOSEN if token is None else np.asarray(token)
    y, dx, dup, ddown, dweight = (np.zeros_like(array) for array in (dy, x, up64, down, weight))
    for assignment in range(ASSIGNMENTS):
        row, e, t = int(permutation.row[assignment]), int(expert[assignment]), owner[assignment]
        if row >= permutation.assignment.shape[0]:
            continue
        hidden = x[t] @ up64[e]
        y[t] += weight[assignment] * (hidden @ down[e])
        to_hidden = weight[assignment] * (down[e] @ dy[t])
        dx[t] += up64[e] @ to_hidden
        dup[e] += np.outer(x[t], to_hidden)
        ddown[e] += weight[assignment] * np.outer(hidden, dy[t])
        dweight[assignment] = (hidden @ down[e]) @ dy[t]
    return {"y": y, "x": dx, "up": dup, "down": ddown, "weight": dweight}


def assert_right(
    implementation: str | None,
    dtype: Any = jnp.float32,
    tolerance: float = 1e-5,
    token_major: bool = True,
    capacity: int | None = None,
) -> None:
    """With NaN in every row of nobody between the two products, and in the weights of those without a row."""
    given, expert, token = operands(dtype), routed(), token_of(token_major)
    permutation = sort_by_expert(expert, EXPERTS)
    if capacity is not None:
        permutation = fixed_groups(permutation, capacity)
    missing = permutation.row >= permutation.assignment.shape[0]
    given = given._replace(weight=jnp.where(missing, jnp.nan, given.weight))
    empty = (permutation.assignment >= ASSIGNMENTS)[:, None]

    @jax.jit
    def run(x, up, down, weight, dy):
        def layer(x, up, down, weight):
            hidden = gather_matmul(x, up, permutation, token, implementation=implementation)
            assert hidden.shape == (permutation.assignment.shape[0], HIDDEN)
            hidden = jnp.where(empty & (jnp.isnan(hidden) | (hidden == 0)), jnp.full((), jnp.nan, hidden.dtype), hidden)
            return matmul_combine(
                hidden, down, weight, permutation, token, tokens=TOKENS, implementation=implementation
            )

        y, back = jax.vjp(layer, x, up, down, weight)
        return dict(zip(("y", "x", "up", "down", "weight"), (y, *back(dy)), strict=True))

    expected = in_loops(given, expert, permutation, token)
    for name, found in run(*given).items():
        assert found.dtype == (jnp.float32 if name == "weight" else dtype)
        allowed = tolerance * max(np.abs(expected[name]).max(), 1.0)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected[name], rtol=0, atol=allowed, err_msg=name)


@pytest.mark.smoke
@pytest.mark.parametrize("token_major", [True, False])
def test_values_and_gradients_are_those_of_loops(token_major):
    assert_right(None, token_major=token_major)


def test_rows_that_are_kept_empty_count_for_nothing():
    # Of 12 places of each expert some stay empty, and some assignments find none.
    assert_right(None, capacity=12)


def test_packed_matrices_have_no_gradient_and_are_what_they_stand_for():
    given, expert = operands(), routed()
    permutation, packed = sort_by_expert(expert, EXPERTS), quantize(given.up, INT8)

    def layer(x: jax.Array) -> jax.Array:
        hidden = gather_matmul(x, packed, permutation)
        return matmul_combine(hidden, given.down, given.weight, permutation, tokens=TOKENS)

    y, back = jax.vjp(layer, given.x)
    expected = in_loops(given, expert, permutation, None, dequantize(packed))
    np.testing.assert_allclose(y, expected["y"], atol=1e-4)
    np.testing.assert_allclose(back(given.dy)[0], expected["x"], atol=1e-4)


def test_without_tokens_or_assignments_there_is_nothing():
    given = operands()
    nobody = sort_by_expert(jnp.zeros(0, jnp.int32), EXPERTS)
    assert gather_matmul(given.x, given.up, nobody).shape == (0, HIDDEN)
    y = matmul_combine(jnp.zeros((0, HIDDEN)), given.down, jnp.zeros(0), nobody, tokens=TOKENS)
    assert y.shape == (TOKENS, WIDTH) and not y.any()


def test_what_does_not_fit_is_named(unchecked):
    given, permutation = operands(), sort_by_expert(routed(), EXPERTS)
    hidden = jnp.zeros((ASSIGNMENTS, HIDDEN))
    with pytest.raises(ValueError, match=r"w has shape \(5, 7, 12\) and dtype float32; x is float32\[20, 12\]"):
        gather_matmul(given.x, given.down, permutation)
    with pytest.raises(ValueError, match="permutation has 5 groups and w 4; they must be as many"):
        gather_matmul(given.x, given.up[:4], permutation)
    with pytest.raises(ValueError, match="token is None, with 60 assignments and 19 tokens"):
        gather_matmul(given.x[:19], given.up, permutation)
    with pytest.raises(ValueError, match=r"weight has shape \(59,\)"):
        matmul_combine(hidden, given.down, given.weight[:59], permutation, tokens=TOKENS)
    with pytest.raises(ValueError, match=r"rows has shape \(59, 7\); the permutation has 60 rows"):
        matmul_combine(hidden[:59], given.down, given.weight, permutation, tokens=TOKENS)
    with pytest.raises(ValueError, match="implementation is 'fast'; allowed are None, 'composed', 'triton'"):
        gather_matmul(given.x, given.up, permutation, implementation="fast")
    with pytest.raises(NotImplementedError, match="triton is for GPUs; the platform is cpu"):
        gather_matmul(given.x, given.up, permutation, implementation="triton")
