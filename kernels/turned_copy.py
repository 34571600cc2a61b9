"""A copy of a transposed matrix on the host, in C++ where there is a compiler: NumPy goes element by element over rows
that fall on the same lines of the cache, and keeps other threads waiting."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .native_code import compiled_library

SOURCE = Path(__file__).with_suffix(".cc")
WIDENED = 24
"""Kind of bfloat16 that becomes float32; else a kind is the size of an element in bytes."""


def turned_copy(seen: np.ndarray, target: np.ndarray) -> bool:
    """Copy a matrix whose first axis is the contiguous one into one whose second is. Other threads go on meanwhile.

    Args:
        seen: [I, O], its columns contiguous.
        target: [I, O], its rows contiguous, of the same dtype; or float32 for bfloat16.

    Returns:
        Whether it was done: not without a compiler, and not between other dtypes.
    """
    kind = _kind(seen.dtype, target.dtype)
    library = None if kind is None else _library()
    if library is None or seen.strides[0] != seen.itemsize or target.strides[1] != target.itemsize:
        return False
    steps = seen.strides[1], target.strides[0]
    if library.turned_copy(seen.ctypes.data, steps[0], target.ctypes.data, steps[1], *seen.shape, kind):
        raise AssertionError(f"turned_copy knows no kind {kind}")
    return True


def _kind(seen: np.dtype, target: np.dtype) -> int | None:
    if seen == target and seen.itemsize in (1, 2, 4):
        return seen.itemsize
    return WIDENED if seen == jnp.bfloat16 and target == np.float32 else None


@functools.cache
def _library() -> Any:
    try:
        library = compiled_library(SOURCE)
    except OSError:  # the grouped product warns of a missing compiler; here it only takes longer
        return None
    integer, address = ctypes.c_int64, ctypes.c_void_p
    library.turned_copy.argtypes = [address, integer, address, integer, integer, integer, ctypes.c_int]
    return library
