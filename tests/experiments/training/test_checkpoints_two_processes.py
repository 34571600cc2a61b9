"""Two processes save one checkpoint together, and each finds its shards and its place in the data again."""

import socket
import subprocess
import sys
from pathlib import Path

CHILD = """
import sys
import grain, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dynamoe.experiments.training.checkpoints import Checkpoints

process, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, process)
mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
split = NamedSharding(mesh, P("fsdp", "expert"))
whole = NamedSharding(mesh, P())
state = {
    "w": jax.make_array_from_callback(values.shape, split, lambda index: values[index]),
    "key": jax.jit(lambda: jax.random.key(3), out_shardings=whole)(),
}

def data():
    return iter(grain.MapDataset.range(100)[process::2].to_iter_dataset())

position = data()
for _ in range(2 + process):
    next(position)
with Checkpoints(folder) as checkpoints:
    checkpoints.save(5, state, position, {"held_out_bits_per_byte": 1.0})
    checkpoints.wait()
    assert (checkpoints.all_steps(), checkpoints.best_step()) == ([5], 5)
    other = NamedSharding(mesh, P("expert", "fsdp"))
    template = {
        "w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=other),
        "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=whole),
    }
    moved = data()
    found, step = checkpoints.restore(template, moved)
    assert step == 5
    for shard in found["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
    assert next(moved) == next(position) == 2 * (2 + process) + process
"""


def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    children = [
        subprocess.Popen(
            ["env", "JAX_PLATFORMS=cpu", f"XLA_FLAGS={flags}", sys.executable, "-c", CHILD, str(i), address, tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
