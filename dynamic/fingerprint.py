"""A fingerprint of weights, so that what was calibrated with one model is not used with another."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(weights: Any) -> str:
    """SHA-256, as hexadecimal digits, of a pytree's paths, types, shapes and numbers. Reads every array on the host.

    Args:
        weights: arrays, or variables that hold them: `nnx.state(model)`.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
