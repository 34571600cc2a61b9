"""What every op does the same under `jax.shard_map`."""

import jax


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Under shard_map, let all arrays vary over the mesh axes that any of them varies over.

    So the gradient of an array that all devices share is summed over the devices, by the transpose of this.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [jax.lax.pcast(a, new, to="varying") if new else a for a, new in zip(arrays, missing, strict=True)]
