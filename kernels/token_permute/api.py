"""The three public functions. Letters: T tokens, D width, K experts per token, A assignments, M rows, E experts.

permutation = sort_by_expert(expert, experts)
rows = permute(x, permutation)
y = unpermute(network_of_each_expert(rows, permutation.group_sizes), weight, permutation, tokens=T)

As in MegaBlocks, Gale et al. 2022, https://arxiv.org/abs/2211.15841. The permutation is plain index arrays: a kernel
that gathers while it loads its tiles, or scatters while it stores them, takes it and needs no permuted copy in memory.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..implementations import OTHER, run_implementation
from ..manual_axes import vary_alike
from .checks import check_matrix, check_permutation, check_rows, check_token, check_weight
from .counting import sort_by_expert_counting
from .permutation import Permutation
from .reference import permute_reference, sort_by_expert_reference, unpermute_reference
from .xla import permute_xla, sort_by_expert_xla, unpermute_xla

SORTS = {
    "counting": sort_by_expert_counting,
    "xla": sort_by_expert_xla,
    "reference": sort_by_expert_reference,
}
PREFERRED_SORTS = {"cpu": ("counting",), OTHER: ("xla",)}
PREFERRED_FOR_FEW = {OTHER: ("xla",)}
PERMUTES = {"xla": permute_xla, "reference": permute_reference}
UNPERMUTES = {"xla": unpermute_xla, "reference": unpermute_reference}
PREFERRED_MOVES = {OTHER: ("xla",)}


def sort_by_expert(expert: Int[Array, " A"], experts: int, *, implementation: str | None = None) -> Permutation:
    """Give each assignment a row so that the rows stand expert by expert, within one in the order of the assignments.

    Args:
        expert: the expert of each assignment [A], integers. What is not in 0 to E - 1 belongs to nobody: it has no row,
            and as many rows at the end are empty.
        experts: E.
        implementation: "counting" (a counting sort; the default on CPU from 2,048 assignments on, 32 per expert at
            least), "xla" (JAX's sort; the default otherwise), "reference" (two argsorts); None: the platform's.

    Returns:
        M = A rows, int32. The result is exact, so the implementations agree.

    Raises:
        ValueError: the arguments do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    if expert.ndim != 1:
        raise ValueError(f"expert has shape {expert.shape}; it must be [A]")
    if not jnp.issubdtype(expert.dtype, jnp.integer):
        raise ValueError(f"expert has dtype {expert.dtype}; it must be of integers")
    if experts < 1:
        raise ValueError(f"experts is {experts}; it must be at least 1")
    # Compared as they came: in another dtype a stranger might turn into somebody.
    somebody = (expert >= 0) & (expert < experts) if _holds(expert.dtype, experts) else expert >= 0
    expert = jnp.where(somebody, expert.astype(jnp.int32), experts)
    if not expert.shape[0]:
        return Permutation(expert, expert, jnp.zeros(experts, jnp.int32))
    preferred = PREFERRED_SORTS if expert.shape[0] >= max(2048, 32 * experts) else PREFERRED_FOR_FEW
    return run_implementation(implementation, SORTS, preferred, expert, experts)


def permute(
    x: Float[Array, "T D"],
    permutation: Permutation,
    token: Int[Array, " A"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Carry each token to the rows of its assignments. An empty row is zero, and its gradient goes nowhere.

    Differentiable in x; the gradient of a token sums over its assignments, in float32 at least.

    Args:
        x: tokens [T, D], floating.
        permutation: of A assignments to M rows.
        token: the token of each assignment [A], in 0 to T - 1; None: assignment a is of token a // K, with A = T * K.
        implementation: "xla" (gathers forward and backward; the default), "reference" (its gradient is a scatter);
            None: the platform's.

    Returns:
        rows [M, D] in the dtype of x.

    Raises:
        ValueError: the arguments do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    check_matrix("x", x, "[T, D]")
    check_permutation(permutation)
    check_token(token, permutation.row.shape[0], x.shape[0])
    if not (x.size and permutation.row.size):
        return jnp.zeros((permutation.assignment.shape[0], x.shape[1]), x.dtype)
    x, permutation, token = vary_alike(x, permutation, token)
    return run_implementation(implementation, PERMUTES, PREFERRED_MOVES, x, permutation, token)


def unpermute(
    rows: Float[Array, "M D"],
    weight: Float[Array, " A"],
    permutation: Permutation,
    token: Int[Array, " A"] | None = None,
    *,
    tokens: int,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Sum the rows of each token's assignments, each times its weight. An assignment without a row adds nothing,
    whatever its weight, and an empty row nothing, whatever it holds.

    Differentiable in rows and weight. Products and sums run in float32 at least.

    Args:
        rows: [M, D], floating.
        weight: one per assignment [A], floating.
        permutation: of A assignments to M rows.
        token: as for `permute`.
        tokens: T.
        implementation: "xla" (gathers; a scatter where `token` is given; the default), "reference" (scatters); None:
            the platform's.

    Returns:
        y [T, D] in the dtype of the rows.

    Raises:
        ValueError: the arguments do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    check_matrix("rows", rows, "[M, D]")
    check_permutation(permutation)
    assignments = permutation.row.shape[0]
    check_rows(rows, permutation, "D")
    check_weight(weight, assignments)
    check_token(token, assignments, tokens)
    if not (rows.size and assignments and tokens):
        return jnp.zeros((tokens, rows.shape[1]), rows.dtype)
    rows, weight, permutation, token = vary_alike(rows, weight, permutation, token)
    return run_implementation(implementation, UNPERMUTES, PREFERRED_MOVES, rows, weight, permutation, tokens, token)


def _holds(dtype: np.dtype, number: int) -> bool:
    return number <= jnp.iinfo(dtype).max
