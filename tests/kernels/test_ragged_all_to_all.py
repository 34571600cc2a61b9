"""The ragged exchange against numpy, values and gradients, on four fake devices in a process of their own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dynamoe.kernels.ragged_all_to_all import Slices, ragged_all_to_all

DEVICES, HELD, ROOM, WIDTH = 4, 12, 20, 3


def numpy_exchange(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows [N, M, D] that stand receiver by receiver; those received stand sender by sender."""
    y = np.zeros((DEVICES, ROOM, WIDTH))
    for receiver in range(DEVICES):
        parts = []
        for sender in range(DEVICES):
            first = sizes[sender, :receiver].sum()
            parts.append(rows[sender, first : first + sizes[sender, receiver]])
        received = np.concatenate(parts)
        y[receiver, : len(received)] = received
    return y


def exchange(mesh: jax.sharding.Mesh, implementation: str | None) -> Callable[..., jax.Array]:
    def on_device(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        me, before = jax.lax.axis_index("x"), lambda axis: jnp.cumsum(sizes, axis=axis) - sizes
        slices = Slices(before(1)[me], sizes[me], before(0)[me], sizes[:, me])
        return ragged_all_to_all(rows[0], slices, room=ROOM, axis="x", implementation=implementation)[None]

    split, whole = PartitionSpec("x"), PartitionSpec()
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(split, whole), out_specs=split))


def check_against_numpy() -> None:
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(0)
    rows = random.normal(size=(DEVICES, HELD, WIDTH)).astype(np.float32)
    dy = random.normal(size=(DEVICES, ROOM, WIDTH)).astype(np.float32)
    uneven = random.multinomial(9, [0.4, 0.1, 0.3, 0.2], size=DEVICES)
    cases = {
        "uneven": uneven,
        "nobody sends": np.zeros((DEVICES, DEVICES), int),
        "one device gets all it has room for": np.array([[0, 0, 5, 0]] * DEVICES),
        "everybody keeps its own": np.diag([HELD] * DEVICES),
    }
    for implementation in (None, "padded", "reference"):
        run = exchange(mesh, implementation)
        backward = jax.jit(jax.grad(lambda rows, sizes, run=run: (run(rows, sizes) * dy).sum()))
        for name, sizes in cases.items():
            given = jnp.asarray(sizes, jnp.int32)
            np.testing.assert_array_equal(run(rows, given), numpy_exchange(rows, sizes), err_msg=name)
            # A row's gradient is that of the one place where it went: send its number, and see where that is.
            numbers = np.broadcast_to(np.arange(1.0, DEVICES * HELD + 1).reshape(DEVICES, HELD, 1), rows.shape)
            went = numpy_exchange(numbers, sizes)[..., 0].astype(int)
            wanted = np.zeros((DEVICES * HELD + 1, WIDTH), np.float32)
            wanted[went.reshape(-1)] = dy.reshape(-1, WIDTH)
            np.testing.assert_array_equal(backward(rows, given).reshape(-1, WIDTH), wanted[1:], err_msg=name)

    jaxtyping.config.update("jaxtyping_disable", True)  # the checks would forestall the function's own errors

    def refuses(error: type[Exception], message: str, **options: object) -> None:
        def on_device(rows: jax.Array) -> jax.Array:
            four = jnp.zeros(DEVICES, jnp.int32)
            arguments = {"rows": rows, "slices": Slices(four, four, four, four), "room": ROOM, "axis": "x"} | options
            return ragged_all_to_all(**arguments)

        with pytest.raises(error, match=message):
            jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))(rows[0])

    refuses(ValueError, "room is 0; it must be at least 1 row", room=0)
    refuses(ValueError, r"rows has shape \(4,\) .* it must be \[M, D\], floating", rows=jnp.zeros(4))
    three = jnp.zeros(3, jnp.int32)
    refuses(
        ValueError, "slices.send_from has shape .3,. .* 'x' has 4 devices", slices=Slices(three, three, three, three)
    )
    refuses(NotImplementedError, "no ragged all-to-all for CPU; allowed there are 'padded'", implementation="xla")
    refuses(ValueError, "implementation is 'nccl'; allowed are None, 'xla'", implementation="nccl")


def test_values_gradients_and_refusals(run_with_devices: Callable[..., str]) -> None:
    run_with_devices(DEVICES, check_against_numpy)
