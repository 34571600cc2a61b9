"""The one public function. Letters: M rows that a device holds, R rows that it has room for, D width, N devices of
the axis.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..implementations import OTHER, run_implementation
from ..manual_axes import vary_alike
from .padded import ragged_all_to_all_padded
from .reference import ragged_all_to_all_reference
from .slices import Slices
from .xla import ragged_all_to_all_xla

IMPLEMENTATIONS = {
    "xla": ragged_all_to_all_xla,
    "padded": ragged_all_to_all_padded,
    "reference": ragged_all_to_all_reference,
}
PREFERRED = {"cpu": ("padded",), OTHER: ("xla",)}


def ragged_all_to_all(
    rows: Float[Array, "M D"],
    slices: Slices,
    *,
    room: int,
    axis: str | tuple[str, ...],
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Send a slice of a device's rows to each device of a mesh axis, inside `jax.shard_map`.

    Differentiable in the rows: the gradients travel back by the same exchange.

    Args:
        rows: this device's [M, D], floating.
        slices: who gets which, on all devices in agreement: what device i sends to j is what j receives from i.
        room: R, the rows of the result; every slice must fit in, and in the M rows of its sender.
        axis: the mesh axis, or several, taken as one in this order.
        implementation: "xla" (`jax.lax.ragged_all_to_all`; the default on TPU and GPU; XLA has none for CPU), "padded"
            (an exchange of equal slices of min(M, R) rows; exact, at N times the memory; the default on CPU),
            "reference" (every device gathers all rows and picks its own); None: the platform's.

    Returns:
        [R, D]; zero where nobody wrote.

    Raises:
        ValueError: the arguments do not fit, or no implementation has that name.
        NotImplementedError: the implementation does not run on this platform.
    """
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows has shape {rows.shape} and dtype {rows.dtype}; it must be [M, D], floating")
    if room < 1:
        raise ValueError(f"room is {room}; it must be at least 1 row")
    devices = jax.lax.axis_size(axis)
    for name, entries in slices._asdict().items():
        if entries.shape != (devices,) or not jnp.issubdtype(entries.dtype, jnp.integer):
            raise ValueError(
                f"slices.{name} has shape {entries.shape} and dtype {entries.dtype}; the mesh axis {axis!r} has "
                f"{devices} devices: it must be ({devices},), of integers"
            )
    rows, slices = vary_alike(rows, Slices(*(entries.astype(jnp.int32) for entries in slices)))
    return run_implementation(implementation, IMPLEMENTATIONS, PREFERRED, rows, slices, room, axis)
