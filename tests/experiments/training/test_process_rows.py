"""Each process reads the rows that its devices hold: none is missing, whatever the mesh."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dynamoe.experiments.data import Windows
from dynamoe.experiments.training.process_rows import global_rows, process_rows
from dynamoe.experiments.training.step import to_device
from dynamoe.models import Layout, MeshRules, MeshShape

MESHES = (
    MeshShape(data=4),
    MeshShape(data=1, fsdp=2, expert=2),
    MeshShape(data=2, tensor=2),
    MeshShape(data=1, tensor=4),  # the batch is whole on every device
)


def layouts() -> list[Layout]:
    straight = [Layout(mesh.build()) for mesh in MESHES]
    # As on a TPU slice, where a process's devices need not be neighbours in the mesh.
    devices = np.array(jax.devices())[[0, 2, 1, 3]].tolist()
    return [*straight, Layout(MeshShape(data=4).build(devices)), Layout(MeshShape(data=2, tensor=2).build(devices))]


def check(wanted: str) -> None:
    tokens = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    found = []
    for layout in layouts():
        rows = process_rows(layout, 8)
        assert global_rows(layout, len(rows)) == 8
        placed = to_device(Windows(*[tokens[rows]] * 4), layout)
        for shard in placed.tokens.addressable_shards:
            np.testing.assert_array_equal(shard.data, tokens[shard.index])
        np.testing.assert_array_equal(multihost_utils.process_allgather(placed.tokens, tiled=True), tokens)
        found.append(rows.tolist())
    assert str(found) == wanted.split("|")[jax.process_index()], found


def test_two_processes_read_what_their_devices_hold(run_with_processes: Callable[..., list[str]]) -> None:
    low, high, all_rows = [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))
    first = [low, low, low, all_rows, [0, 1, 4, 5], all_rows]
    second = [high, high, high, all_rows, [2, 3, 6, 7], all_rows]
    run_with_processes(2, 2, check, f"{first}|{second}")


def test_one_process_reads_all() -> None:
    layout = Layout(MeshShape().build(), MeshRules())
    assert process_rows(layout, 3).tolist() == [0, 1, 2] and global_rows(layout, 3) == 3


def test_a_batch_that_does_not_divide_is_refused(run_with_devices: Callable[..., str]) -> None:
    run_with_devices(2, check_refusal)


def check_refusal() -> None:
    with pytest.raises(ValueError, match="axis 'batch' of batch_size has length 3; it must be a multiple of 2"):
        process_rows(Layout(MeshShape().build()), 3)
