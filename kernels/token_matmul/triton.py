"""Tokens are gathered while tiles are loaded, and rows scattered while they are stored, in Triton.

As in ScatterMoE, Tan et al. 2024, https://arxiv.org/abs/2403.08245, and SonicMoE, Guo et al. 2025,
https://arxiv.org/abs/2512.14080: the tokens of the experts' rows are never copied, forward or backward. What is written
stands assignment by assignment, weighted, and is summed per token afterwards; adding to tokens directly would take
atomic additions, whose order, and so the result's last bits, changes from run to run. The gradient of a weight is that
of SonicMoE: the products of the rows with dy @ w^T, which is needed anyway, so that no result is kept for it.

Not yet run on a GPU. Letters: T tokens, D width, F hidden width, A assignments, M rows, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..grouped_matmul.marking import marked
from ..grouped_matmul.triton_kernels.calls import outer_products, product
from ..quantized import Quantized
from ..token_permute import Permutation
from ..token_permute.permutation import Tokens, sum_per_token, take, token_of_row, wide
from ..triton_call import refuse_without_gpu


def gather_matmul_triton(
    x: Float[Array, "T D"], w: jax.Array | Quantized, permutation: Permutation, token: Tokens
) -> Float[Array, "M F"]:
    """See `gather_matmul`.

    Raises:
        NotImplementedError: this is not traced for a GPU nor in Triton's interpreter, or w is packed.
    """
    y = _gather_matmul(x, _checked(w), permutation, token)
    return marked(y, permutation.group_sizes, y.shape[0])


def matmul_combine_triton(
    rows: Float[Array, "M F"],
    w: jax.Array | Quantized,
    weight: Float[Array, " A"],
    permutation: Permutation,
    tokens: int,
    token: Tokens,
) -> Float[Array, "T D"]:
    """See `matmul_combine`, and `gather_matmul_triton` for what it raises."""
    y = jnp.asarray(_matmul_combine(tokens, rows, _checked(w), weight, permutation, token))
    return marked(y, permutation.group_sizes, rows.shape[0])


def _checked(w: jax.Array | Quantized) -> jax.Array:
    refuse_without_gpu("triton")
    if isinstance(w, Quantized):
        raise NotImplementedError(f"w is packed as {w.format.name}; triton moves tokens with plain matrices alone")
    return w


@jax.custom_vjp
def _gather_matmul(x, w, permutation, token):
    return product(x, w, permutation.group_sizes, source=token_of_row(x.shape[0], permutation, token))


def _gather_forward(x, w, permutation, token):
    return _gather_matmul(x, w, permutation, token), (x, w, permutation, token)


def _gather_backward(residuals, dy):
    x, w, permutation, token = residuals
    tokens, sizes = x.shape[0], permutation.group_sizes
    to_assignment = _by_assignment(dy, w, permutation, transposed=True)
    dx = sum_per_token(tokens, wide(to_assignment), token).astype(x.dtype)
    dw = outer_products(x, dy, sizes, source=token_of_row(tokens, permutation, token))
    return dx, dw, None, None


_gather_matmul.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_combine(tokens, rows, w, weight, permutation, token):
    factor = take(weight, permutation.assignment)
    weighted = _by_assignment(rows, w, permutation, factor=factor)
    return sum_per_token(tokens, wide(weighted), token).astype(rows.dtype)


def _combine_forward(tokens, rows, w, weight, permutation, token):
    return _matmul_combine(tokens, rows, w, weight, permutation, token), (rows, w, weight, permutation, token)


def _combine_backward(tokens, residuals, dy):
    rows, w, weight, permutation, token = residuals
    source = token_of_row(tokens, permutation, token)
    unweighted = product(dy, w, permutation.group_sizes, source=source, transposed=True)
    factor = take(weight, permutation.assignment).astype(jnp.float32)[:, None]
    # A row of nobody may hold NaN, and 0 * NaN is NaN.
    own = jnp.where((permutation.assignment < weight.shape[0])[:, None], rows, jnp.zeros((), rows.dtype))
    to_rows = (wide(unweighted) * factor).astype(rows.dtype)
    to_weight = take((wide(own) * wide(unweighted)).sum(axis=1), permutation.row).astype(weight.dtype)
    dw = outer_products((wide(own) * factor).astype(rows.dtype), dy, permutation.group_sizes, target=source)
    return to_rows, dw, to_weight, None, None


_matmul_combine.defvjp(_combine_forward, _combine_backward)


def _by_assignment(
    rows: Float[Array, "M _"],
    w: Float[Array, "E _ _"],
    permutation: Permutation,
    *,
    factor: Float[Array, " M"] | None = None,
    transposed: bool = False,
) -> Float[Array, "A _"]:
    """The products of the rows, each written to its assignment; zero for an assignment without a row."""
    assignments: Int[Array, " A"] = permutation.row
    found = product(
        rows,
        w,
        permutation.group_sizes,
        target=permutation.assignment,
        factor=factor,
        outputs=assignments.shape[0],
        transposed=transposed,
    )
    # No program writes those, so that anything may stand there.
    return jnp.where((assignments < rows.shape[0])[:, None], found, jnp.zeros((), found.dtype))
