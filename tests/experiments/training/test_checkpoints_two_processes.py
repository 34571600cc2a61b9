"""Processes save one checkpoint together; any other number of them restores the same bits and the same place."""

import json
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dynamoe.experiments.training.checkpoints import Checkpoints

VALUES = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def make_data() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def layouts(first: str, second: str) -> dict[str, NamedSharding]:
    shape = (len(jax.devices()) // 2, 2) if len(jax.devices()) > 1 else (1, 1)
    mesh = jax.make_mesh(shape, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    return {"w": NamedSharding(mesh, P(first, second)), "key": NamedSharding(mesh, P())}


def save(folder: str) -> None:
    sharding = layouts("fsdp", "expert")
    key = jax.jit(lambda: jax.random.key(3), out_shardings=sharding["key"])()
    state = {"w": jax.make_array_from_callback(VALUES.shape, sharding["w"], lambda index: VALUES[index]), "key": key}
    data = make_data()
    next(data), next(data)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, state, data, {"held_out_bits_per_byte": 1.0})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([5], 5)
        if jax.process_index() == 1:
            next(data)
        if jax.process_count() > 1:
            with pytest.raises(ValueError, match=r"and elsewhere in the processes 1 than in process 0"):
                checkpoints.save(6, state, data)


def restore(folder: str) -> None:
    sharding = layouts("expert", "fsdp")
    template = {
        "w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding["w"]),
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding["key"]),
    }
    data = make_data()
    with Checkpoints(folder) as checkpoints:
        found, step = checkpoints.restore(template, data)
    assert step == 5 and next(data) == 2
    for shard in found["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, VALUES[shard.index])


def test_eight_devices_of_two_processes_then_four_then_one(
    run_with_processes: Callable[..., list[str]], run_with_devices: Callable[..., str], tmp_path: Path
) -> None:
    run_with_processes(2, 4, save, str(tmp_path))
    run_with_processes(2, 2, restore, str(tmp_path))
    run_with_devices(4, restore, str(tmp_path))
    restore(str(tmp_path))


def test_a_checkpoint_of_one_process_restores_in_two(
    run_with_processes: Callable[..., list[str]], tmp_path: Path
) -> None:
    save(str(tmp_path))
    run_with_processes(2, 1, restore, str(tmp_path))


def test_the_position_that_an_older_version_kept_in_files_is_read(tmp_path: Path) -> None:
    from dynamoe.experiments.training import fingerprint

    data, text = make_data(), json.dumps({"next_index": 2})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"w": jnp.ones(3)})
    file = tmp_path / "5" / "manifest" / "metadata"
    manifest = {
        key: value for key, value in json.loads(file.read_text()).items() if key not in ("position", "checksum")
    }
    manifest["positions"] = [fingerprint.text_checksum(text)] * 2
    file.write_text(json.dumps(fingerprint.seal(manifest)))
    (tmp_path / "5" / "data").mkdir()
    (tmp_path / "5" / "data" / "process_0-of-2.json").write_text(text)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore({"w": jnp.ones(3)}, data)
    assert next(data) == 2
