"""What every op does the same under `jax.shard_map`."""

from typing import Any

import jax


def vary_alike(*arguments: Any) -> Any:
    """Under shard_map, let all arrays vary over the mesh axes that any of them varies over.

    So the gradient of an array that all devices share is summed over the devices, by the transpose of this.

    Args:
        *arguments: pytrees of arrays.

    Returns:
        The arguments, as a tuple.
    """
    arrays, structure = jax.tree.flatten(arguments)
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    varying = [jax.lax.pcast(a, new, to="varying") if new else a for a, new in zip(arrays, missing, strict=True)]
    return jax.tree.unflatten(structure, varying)


def vary_as(result: jax.Array, argument: jax.Array) -> jax.Array:
    """Under shard_map, take what a call of foreign code returns to vary over the mesh axes that its argument varies
    over: JAX takes it to be the same on all devices."""
    varying, known = (jax.typeof(array).manual_axis_type.varying for array in (argument, result))
    return jax.lax.pcast(result, tuple(varying - known), to="varying") if varying - known else result
