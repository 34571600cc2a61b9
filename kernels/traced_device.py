"""The device that a function is traced for: of the mesh around it, which need not be here, else the first of JAX."""

from typing import Any

import jax

MULTIPROCESSORS = 132
"""Of H100 and H200 in the SXM form; where a device says how many it has, that counts."""


def device_kind() -> str:
    """As "NVIDIA H200"."""
    return _device().device_kind


def multiprocessors() -> int:
    """Of a GPU."""
    return getattr(_device(), "core_count", None) or getattr(_device(), "num_cores", None) or MULTIPROCESSORS


def _device() -> Any:
    absent = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if absent is None else absent
