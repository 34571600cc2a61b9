"""The two public functions: into the experts, and out of them.

permutation = sort_by_expert(expert, experts)
hidden = gather_matmul(x, up, permutation)
y = matmul_combine(hidden, down, weight, permutation, tokens=T)

They are `permute`, `grouped_matmul` and `unpermute`, and may do with less: a kernel gathers a token's numbers while it
loads its tiles and scatters rows while it stores them, without a permuted copy of the tokens in memory.
Letters: T tokens, D width, F hidden width, K experts per token, A assignments, M rows, E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..grouped_matmul.api import DTYPES
from ..implementations import OTHER, run_implementation
from ..manual_axes import vary_alike
from ..quantized import Quantized
from ..token_permute import Permutation
from ..token_permute.checks import check_matrix, check_permutation, check_rows, check_token, check_weight
from ..token_permute.permutation import Tokens
from .composed import gather_matmul_composed, matmul_combine_composed


def _gather_triton(x, w, permutation, token):
    """Imported at its first call, as jax-triton is."""
    from .triton import gather_matmul_triton

    return gather_matmul_triton(x, w, permutation, token)


def _combine_triton(rows, w, weight, permutation, tokens, token):
    from .triton import matmul_combine_triton

    return matmul_combine_triton(rows, w, weight, permutation, tokens, token)


GATHERS = {"composed": gather_matmul_composed, "triton": _gather_triton}
COMBINES = {"composed": matmul_combine_composed, "triton": _combine_triton}
PREFERRED = {OTHER: ("composed",)}


def gather_matmul(
    x: Float[Array, "T D"],
    w: Float[Array, "E D F"] | Quantized,
    permutation: Permutation,
    token: Int[Array, " A"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply each row's token with the matrix of the row's expert. An empty row is zero.

    Differentiable in x and w; the gradient of a token sums over its assignments, in float32 at least.

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        w: one matrix per expert [E, D, F], in the dtype of x; or packed, standing for it, with no gradient.
        permutation: of A assignments to M rows, as `sort_by_expert` makes it.
        token: the token of each assignment [A]; None: assignment a is of token a // K, with A = T * K.
        implementation: "composed" (permute, then `grouped_matmul`, each by the platform's best; the default), "triton"
            (for CUDA GPUs: gathers while it loads; no default before a run on one); None: the platform's.

    Returns:
        rows [M, F] in the dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    _check(x, w, permutation, "x", "[T, D]")
    check_token(token, permutation.row.shape[0], x.shape[0])
    if not (x.size and w.size and permutation.row.size):
        return jnp.zeros((permutation.assignment.shape[0], w.shape[2]), x.dtype)
    x, w, permutation, token = vary_alike(x, _without_gradient(w), *_in_int32(permutation, token))
    return run_implementation(implementation, GATHERS, PREFERRED, x, w, permutation, token)


def matmul_combine(
    rows: Float[Array, "M F"],
    w: Float[Array, "E F D"] | Quantized,
    weight: Float[Array, " A"],
    permutation: Permutation,
    token: Int[Array, " A"] | None = None,
    *,
    tokens: int,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Multiply rows with their expert's matrix, and sum the results of each token's assignments, times their weights.

    Differentiable in rows, w and weight. Sums run in float32 at least.

    Args:
        rows: [M, F], float32, bfloat16 or float16; those of nobody count for nothing, whatever they hold.
        w: one matrix per expert [E, F, D], in the dtype of the rows; or packed, standing for it, with no gradient.
        weight: one per assignment [A], floating.
        permutation: of A assignments to M rows.
        token: as for `gather_matmul`.
        tokens: T.
        implementation: "composed" (`grouped_matmul`, then unpermute; the default), "triton" (for CUDA GPUs: weights and
            scatters while it stores; no default before a run on one); None: the platform's.

    Returns:
        y [T, D] in the dtype of the rows.

    Raises:
        ValueError: shapes or dtypes do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    _check(rows, w, permutation, "rows", "[M, F]")
    assignments = permutation.row.shape[0]
    check_rows(rows, permutation, "F")
    check_weight(weight, assignments)
    check_token(token, assignments, tokens)
    if not (rows.size and w.size and assignments and tokens):
        return jnp.zeros((tokens, w.shape[2]), rows.dtype)
    indices = _in_int32(permutation, token)
    rows, w, weight, permutation, token = vary_alike(rows, _without_gradient(w), weight, *indices)
    return run_implementation(implementation, COMBINES, PREFERRED, rows, w, weight, permutation, tokens, token)


def _check(x: jax.Array, w: jax.Array | Quantized, permutation: Permutation, name: str, letters: str) -> None:
    check_matrix(name, x, letters)
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed are {', '.join(dtype.__name__ for dtype in DTYPES)}")
    check_permutation(permutation)
    if w.ndim != 3 or w.dtype != x.dtype or w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w has shape {w.shape} and dtype {w.dtype}; {name} is {x.dtype}{list(x.shape)}: w must be of that dtype, "
            f"with {x.shape[1]} on its second of three axes"
        )
    if permutation.group_sizes.shape != (w.shape[0],):
        raise ValueError(
            f"permutation has {permutation.group_sizes.shape[0]} groups and w {w.shape[0]}; they must be as many"
        )


def _in_int32(permutation: Permutation, token: Tokens) -> tuple[Permutation, Tokens]:
    token = None if token is None else token.astype(jnp.int32)
    return Permutation(*(array.astype(jnp.int32) for array in permutation)), token


def _without_gradient(w: jax.Array | Quantized) -> jax.Array | Quantized:
    return jax.lax.stop_gradient(w) if isinstance(w, Quantized) else w
