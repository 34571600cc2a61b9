"""The one public function. Letters: M rows, D inner width, F output width, E groups."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from ..implementations import OTHER, run_implementation
from ..manual_axes import vary_alike
from ..quantized import INT8, Quantized, QuantizedRows
from .blocked import grouped_matmul_blocked
from .marking import marked
from .native import grouped_matmul_native
from .reference import grouped_matmul_reference
from .xla import grouped_matmul_xla


def _mosaic_tpu(x, w, group_sizes):
    """Imported at its first call: Pallas for TPU is a fifth of the package's import time, and few need it."""
    from .mosaic_tpu import grouped_matmul_mosaic_tpu

    return grouped_matmul_mosaic_tpu(x, w, group_sizes)


def _mosaic_gpu(x, w, group_sizes):
    """Imported at its first call, like the one before."""
    from .mosaic_gpu_kernels.calls import grouped_matmul_mosaic_gpu

    return grouped_matmul_mosaic_gpu(x, w, group_sizes)


def _triton(x, w, group_sizes):
    """Imported at its first call, as jax-triton is."""
    from .triton_kernels.calls import grouped_matmul_triton

    return grouped_matmul_triton(x, w, group_sizes)


def _marking(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same, with NaN in one element of y where traced group sizes break their bounds."""

    def run_and_mark(x, w, group_sizes):
        y = run(x, w, group_sizes)
        return marked(y, group_sizes, y.shape[0])

    return run_and_mark


IMPLEMENTATIONS = {
    "native": grouped_matmul_native,  # marks by itself: in XLA that took as long as decoding a few rows
    "blocked": _marking(grouped_matmul_blocked),
    "xla": _marking(grouped_matmul_xla),
    "mosaic_tpu": _marking(_mosaic_tpu),
    "mosaic_gpu": _marking(_mosaic_gpu),
    "triton": _marking(_triton),
    "reference": _marking(grouped_matmul_reference),
}
PREFERRED = {"cpu": ("native", "blocked"), OTHER: ("xla",)}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    x: Float[Array, "M D"] | QuantizedRows,
    w: Float[Array, "E D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply rows that are sorted by group with the matrix of their group.

    Group e owns the `group_sizes[e]` rows after those of the groups before it: `y[i] = x[i] @ w[e]` for each of them.
    A group may be empty. Rows past `sum(group_sizes)` belong to nobody: they give zeros in y and in the gradients,
    whatever they hold. The grouped GEMM of dropless mixtures: MegaBlocks, Gale et al. 2022,
    https://arxiv.org/abs/2211.15841.

    Differentiable in x and w. Sums run in float32. M and E are static; `group_sizes` may change from call to call
    without compiling again. Inside `shard_map` it acts on the device's own rows and weights.

    A packed w is unpacked a group's matrix at a time or finer ("xla": the whole of it), and has no gradient: that is
    zero. With packed x too, the products are of integers, summed in int32; then neither has one.

    Args:
        x: rows [M, D], float32, bfloat16 or float16; or int8 rows made by `quantize_rows`, where w is int8 with one
            scale per column and no zero points.
        w: one matrix per group [E, D, F], in the dtype of x; or packed, standing for that dtype.
        group_sizes: rows of each group [E], integers, not negative, together at most M.
        implementation: "native" (C++ on CPU; the default there), "blocked" (plain JAX, cost independent of E; the
            default on CPU where there is no C++ compiler, for float16, and for packed x where the CPU has no
            AVX512-VNNI), "xla" (`jax.lax.ragged_dot`; the default elsewhere), "mosaic_tpu" (Pallas for TPU),
            "mosaic_gpu" (Pallas for Hopper GPUs), "triton" (for CUDA GPUs, through jax-triton; like the two before no
            default before a run on such a chip), "reference" (E times the work, to check others against); None: the
            platform's.

    Returns:
        y [M, F] in the dtype of x; of packed rows in float32. Where `group_sizes` is traced, so that its values cannot
        be checked, and breaks its bounds, y[0, 0] is NaN: a training step then ends in a loss that is not finite
        instead of going on silently.

    Raises:
        ValueError: shapes or dtypes do not fit, `group_sizes` breaks its bounds, or no implementation has that name.
        NotImplementedError: the implementation does not take these arguments.
    """
    _check(x, w, group_sizes)
    rows = x.codes if isinstance(x, QuantizedRows) else x
    if not (rows.size and w.size):
        return jnp.zeros((rows.shape[0], w.shape[2]), jnp.float32 if isinstance(x, QuantizedRows) else x.dtype)
    x, w, group_sizes = vary_alike(x, w, group_sizes.astype(jnp.int32))
    if isinstance(x, QuantizedRows):
        x = jax.lax.stop_gradient(x)
    if isinstance(w, Quantized):
        w = jax.lax.stop_gradient(w)
    return run_implementation(implementation, IMPLEMENTATIONS, PREFERRED, x, w, group_sizes)


def _check(x: jax.Array | QuantizedRows, w: jax.Array | Quantized, group_sizes: jax.Array) -> None:
    if isinstance(x, QuantizedRows):
        _check_integers(x, w)
        x = x.codes
    elif x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are {', '.join(dtype.__name__ for dtype in DTYPES)}")
    elif w.dtype != x.dtype:
        raise ValueError(f"w has dtype {w.dtype} and x {x.dtype}; they must be of one dtype")
    for name, array, letters in (("x", x, "[M, D]"), ("w", w, "[E, D, F]"), ("group_sizes", group_sizes, "[E]")):
        if array.ndim != letters.count(",") + 1:
            raise ValueError(f"{name} has shape {array.shape}; it must be {letters}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has shape {x.shape} and w {w.shape}; D, x's second axis and w's, must be one number")
    if w.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"group_sizes has length {group_sizes.shape[0]}; w has {w.shape[0]} groups: it must be as long"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes has dtype {group_sizes.dtype}; it must be of integers")
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any():
            group = int(sizes.argmin())
            raise ValueError(f"group_sizes[{group}] is {sizes[group]}; a group has 0 rows or more")
        if sizes.sum() > x.shape[0]:
            raise ValueError(
                f"group_sizes sum to {sizes.sum()}; x has {x.shape[0]} rows: they must sum to at most that"
            )


def _check_integers(x: QuantizedRows, w: jax.Array | Quantized) -> None:
    if not isinstance(w, Quantized):
        raise ValueError(f"x is packed rows and w an array of {w.dtype}; with packed rows w must be packed int8")
    if w.format != INT8 or w.zero_points is not None or w.scales.shape[1:2] != (1,):
        points = "" if w.zero_points is None else " with zero points"
        raise ValueError(
            f"x is packed rows and w {w.format.name} in groups of {w.group_size}{points}; with packed rows w must be "
            "int8, with one group, all of D, and no zero points"
        )
    if x.codes.dtype != jnp.int8 or x.scales.shape != (*x.codes.shape[:1], 1):
        raise ValueError(
            f"x has codes {x.codes.dtype}{list(x.codes.shape)} and scales {list(x.scales.shape)}; they must be "
            "int8[M, D] and [M, 1]"
        )
