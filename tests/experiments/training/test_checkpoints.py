"""Checkpoints come back with the same bits, or not at all."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dynamoe.experiments.training.checkpoints import Checkpoints, DamagedCheckpoint, FailedSave


class Train(NamedTuple):
    params: Any
    optimizer: Any
    key: jax.Array
    step: jax.Array


def make_state(seed: int = 0, width: int = 512) -> Train:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (width, 4)),
        "layers": [{"bias": jax.random.normal(keys[1], (4,)).astype(jnp.bfloat16)}],
        "mask": jnp.array([True, False, True]),
        "empty": jnp.zeros((0, 3)),
    }
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.adam(1e-3).init(params)
    return Train(params, optimizer, keys, jnp.int32(seed))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def as_bytes(leaf: jax.Array) -> bytes:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert as_bytes(a) == as_bytes(b)


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).shuffle(seed=1).to_iter_dataset())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the steps 1 and 2; the data stands after 1 and 2 elements."""
    folder = tmp_path_factory.mktemp("two_steps")
    data = make_iterator()
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            next(data)
            checkpoints.save(step, make_state(step), data, {"held_out_bits_per_byte": 1.0 / step})
    return folder


def test_restores_the_same_bits_and_the_same_data(two_steps: Path) -> None:
    data, reference = make_iterator(), make_iterator()
    with Checkpoints(two_steps) as checkpoints:
        state, step = checkpoints.restore(abstract(make_state()), data)
    assert step == 2
    assert_same_bits(state, make_state(2))
    assert list(data) == list(reference)[2:]


def test_restores_an_older_step_when_asked(two_steps: Path) -> None:
    with Checkpoints(two_steps) as checkpoints:
        state, step = checkpoints.restore(abstract(make_state()), step=1)
        assert step == 1
        assert_same_bits(state, make_state(1))
        with pytest.raises(ValueError, match=r"step is 7; .* has \[1, 2\]"):
            checkpoints.restore(abstract(make_state()), step=7)


def test_arrays_may_be_used_as_the_template(two_steps: Path) -> None:
    with Checkpoints(two_steps) as checkpoints:
        assert_same_bits(checkpoints.restore(make_state(0))[0], make_state(2))


def test_restores_the_parameters_alone(two_steps: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two_steps, tmp_path / "copy")
    with Checkpoints(copy) as checkpoints:
        part, step = checkpoints.restore_part({"params": abstract(make_state().params)})
        assert step == 2
        assert_same_bits(part, {"params": make_state(2).params})
        with pytest.raises(ValueError, match="params.kernal is not in the checkpoint"):
            checkpoints.restore_part({"params": {"kernal": abstract(make_state().params["kernel"])}})


def test_flax_variables_and_plain_arrays_have_the_same_names(tmp_path: Path, key: jax.Array) -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    state = {"params": nnx.state(model, nnx.Param), "key": key}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        found, _ = checkpoints.restore(abstract(state))
        assert_same_bits(found, state)
        assert isinstance(found["params"]["kernel"], nnx.Param)
        pure = nnx.to_pure_dict(state["params"])
        assert_same_bits(checkpoints.restore_part({"params": abstract(pure)})[0], {"params": pure})


def test_keys_of_another_generator_come_back_as_such(tmp_path: Path) -> None:
    state = {"key": jax.random.key(3, impl="rbg"), "raw": jax.random.key_data(jax.random.key(4))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert_same_bits(checkpoints.restore(abstract(state))[0], state)
        threefry = {**state, "key": jax.random.key(3)}
        with pytest.raises(ValueError, match=r"key is key<rbg>\[\] in the checkpoint, key<fry>\[\] wanted"):
            checkpoints.restore(abstract(threefry))


@pytest.mark.parametrize("wrap", ["shuffle", "threads", "mix"])
def test_every_kind_of_iterator_continues(tmp_path: Path, wrap: str) -> None:
    def make() -> grain.DatasetIterator:
        source = grain.MapDataset.range(60).shuffle(seed=2)
        if wrap == "mix":
            source = grain.MapDataset.mix([source, grain.MapDataset.range(100, 160)], weights=[0.7, 0.3])
        data = source.to_iter_dataset().batch(4)
        if wrap == "threads":
            data = grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=2)
        return iter(data)

    data, restored = make(), make()
    for _ in range(3):
        next(data)
    state = {"step": jnp.int32(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, data)
        checkpoints.wait()
        checkpoints.restore(abstract(state), restored)
    np.testing.assert_array_equal([next(restored) for _ in range(4)], [next(data) for _ in range(4)])


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    bits = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 1.0, 7: None}
    state = {"x": jnp.ones(3)}
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        for step, value in bits.items():
            checkpoints.save(step, state, metrics=None if value is None else {"held_out_bits_per_byte": value})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 6, 7], 2)
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step(), checkpoints.latest_step()) == ([2, 6, 7], 2, 7)
        with pytest.raises(ValueError, match="step is 7; .* already has step 7"):
            checkpoints.save(7, state)


def test_without_measurements_only_the_newest_stay(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.ones(3)})
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([3], None)


def test_a_reader_leaves_the_save_of_another_process_alone(two_steps: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two_steps, tmp_path / "copy")
    under_way = copy / "3.orbax-checkpoint-tmp"
    under_way.mkdir()
    with Checkpoints(copy, read_only=True, keep_last=1, keep_best=0) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(make_state()))[0], make_state(2))
        with pytest.raises(ValueError, match="opened with read_only=True"):
            checkpoints.save(3, make_state())
    assert sorted(file.name for file in copy.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]
    with pytest.raises(ValueError, match="no such directory"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_donating_the_state_after_save_changes_nothing(tmp_path: Path) -> None:
    state = {"x": jnp.arange(100_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
        found, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((100_000,), jnp.float32)})
    np.testing.assert_array_equal(found["x"], np.arange(100_000.0, dtype=np.float32))


def test_a_template_of_another_model_is_refused_with_every_difference(two_steps: Path) -> None:
    template = abstract(make_state(width=9))
    del template.params["mask"]
    template.params["router"] = template.step
    data = make_iterator()
    with Checkpoints(two_steps) as checkpoints, pytest.raises(ValueError, match="abstract_state does not") as error:
        checkpoints.restore(template, data)
    for part in (
        "params.router is not in the checkpoint",
        "params.mask is only in the checkpoint",
        "params.kernel is float32[512,4] in the checkpoint, float32[9,4] wanted",
        "optimizer.0.mu.kernel is float32[512,4] in the checkpoint, float32[9,4] wanted",
    ):
        assert part in str(error.value)
    assert next(data) == next(make_iterator())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": np.ones(3)}, "state.x is a ndarray; every leaf must be a jax.Array"),
        ({"x": {"y": 1.0}}, "state.x.y is a float"),
        ({"x.y": jnp.ones(1), "x": {"y": jnp.ones(1)}}, "does not name one array"),
        ({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, "state.x is a shape without values"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_a_write(tmp_path: Path, state: Any, message: str) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, state)
        assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_and_a_missing_position_are_named(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="there is no checkpoint in it"):
            checkpoints.restore({})
        checkpoints.save(1, {"x": jnp.ones(2)})
        with pytest.raises(ValueError, match="holds no position in the data; pass no data_iterator"):
            checkpoints.restore({"x": jnp.ones(2)}, make_iterator())


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif how == "one bit flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("how", ["deleted", "truncated", "zeroed", "one bit flipped"])
def test_damage_to_any_file_gives_the_exact_bits_or_an_error(two_steps: Path, tmp_path: Path, how: str) -> None:
    files = [file.relative_to(two_steps) for file in (two_steps / "2").rglob("*") if file.is_file()]
    outcomes = []
    for number, file in enumerate(files):
        copy = shutil.copytree(two_steps, tmp_path / str(number))
        damage(copy / file, how)
        data = make_iterator()
        with Checkpoints(copy) as checkpoints:
            try:
                state, step = checkpoints.restore(abstract(make_state()), data)
            except DamagedCheckpoint as error:
                assert f"checkpoint {copy}/2 is damaged" in str(error)
                assert "other steps to restore: [1]" in str(error)
                assert "\n" not in str(error)
                assert next(data) == next(make_iterator())
                outcomes.append("refused")
            else:
                assert step == 2
                assert_same_bits(state, make_state(2))
                assert list(data) == list(make_iterator())[2:]
                outcomes.append("same bits")
            assert_same_bits(checkpoints.restore(abstract(make_state()), step=1)[0], make_state(1))
    assert outcomes.count("refused") >= 4, dict(zip(map(str, files), outcomes, strict=True))


def test_values_that_changed_behind_valid_files_are_noticed(two_steps: Path, tmp_path: Path) -> None:
    # The files of another checkpoint of the same shapes are whole, but are not what this manifest promises.
    copy = shutil.copytree(two_steps, tmp_path / "copy")
    shutil.rmtree(copy / "2" / "state")
    shutil.copytree(copy / "1" / "state", copy / "2" / "state")
    with Checkpoints(copy) as checkpoints, pytest.raises(DamagedCheckpoint, match=r"arrays hold other values .*kernel"):
        checkpoints.restore(abstract(make_state()))


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the file size limit below tests the same promise")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# Too few bytes are noticed before the save, too few files only by the thread that writes.
@pytest.mark.parametrize(("options", "problem"), [("size=2m", "the disk is too full"), ("size=64m,nr_inodes=32", "")])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, options: str, problem: str) -> None:
    with small_disk(tmp_path / "disk", options) as disk:
        fill_the_disk(disk / "run", 300_000, problem)


def fill_the_disk(folder: Path, count: int, problem: str) -> None:
    first, second = ({"x": jax.random.normal(jax.random.key(seed), (count,))} for seed in range(2))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, first)
        checkpoints.wait()
        with pytest.raises(FailedSave, match=f"could not save step 2 in {folder}: {problem}") as error:
            checkpoints.save(2, second)
            checkpoints.wait()
        assert f"{4 * count:,} bytes needed" in str(error.value)
        assert "bytes needed" in str(error.value) and "free; other steps to restore: [1]" in str(error.value)
        assert [file.name for file in folder.iterdir()] == ["1"]
        assert checkpoints.all_steps() == [1]
        assert_same_bits(checkpoints.restore(abstract(first))[0], first)
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=200", folder.parent], check=True)
        checkpoints.save(3, second)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.all_steps() == [1, 3]


def write_with_a_file_size_limit(folder: str) -> None:
    path = Path(folder)
    state = {"x": jax.random.normal(jax.random.key(0), (300_000,))}
    with Checkpoints(path, keep_last=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        checkpoints.save(2, state)
        try:
            checkpoints.save(3, state)
        except FailedSave as error:
            assert "could not save step 2" in str(error), error
            assert "other steps to restore: [1]" in str(error), error
        else:
            raise AssertionError("a save beyond the limit passed")
        assert [file.name for file in path.iterdir()] == ["1"]
        assert_same_bits(checkpoints.restore(abstract(state))[0], state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoints.save(4, state)
    with Checkpoints(path) as checkpoints:
        assert checkpoints.all_steps() == [4]


def test_a_write_that_fails_in_the_background_leaves_the_last_checkpoint(tmp_path: Path, run_with_devices: Any) -> None:
    run_with_devices(1, write_with_a_file_size_limit, str(tmp_path / "run"))


def save_on_one_mesh_and_restore_on_others(folder: str) -> None:
    def mesh(**axes: int) -> jax.sharding.Mesh:
        return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    P = PartitionSpec
    eight, two_by_four = mesh(data=8), mesh(data=2, expert=4)
    here = SingleDeviceSharding(jax.devices()[3])
    layouts = {
        "eight": {"w": NamedSharding(eight, P("data")), "key": NamedSharding(eight, P()), "step": here},
        "2x4": {"w": NamedSharding(two_by_four, P("expert", "data")), "key": here, "step": here},
        "replicated": {name: NamedSharding(two_by_four, P()) for name in ("w", "key", "step")},
        "single": dict.fromkeys(("w", "key", "step"), here),
        "explicit": dict.fromkeys(("w", "key", "step"), NamedSharding(jax.make_mesh((8,), ("data",)), P())),
    }
    layouts["explicit"]["w"] = NamedSharding(jax.make_mesh((8,), ("data",)), P(None, "data"))
    values = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "key": jax.random.key(1), "step": jnp.int32(5)}
    for number, layout in enumerate(layouts.values(), start=1):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(number, jax.device_put(values, layout))
            for name, other in layouts.items():
                template = {
                    k: jax.ShapeDtypeStruct(values[k].shape, values[k].dtype, sharding=s) for k, s in other.items()
                }
                found, _ = checkpoints.restore(template)
                assert_same_bits(found, values)
                assert found["w"].sharding == other["w"], name


def test_restores_the_same_bits_on_every_sharding(tmp_path: Path, run_with_devices: Any) -> None:
    run_with_devices(8, save_on_one_mesh_and_restore_on_others, str(tmp_path))


def save_until_killed(folder: str) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"x": jnp.arange(8.0)})
    checkpoints.wait()
    checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (2**24,))})
    time.sleep(60)


def test_after_a_kill_in_a_save_the_last_checkpoint_is_there(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('t', sys.argv[1]);"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t); t.save_until_killed(sys.argv[2])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, __file__, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not any("tmp" in file.name and file.name.startswith("2") for file in tmp_path.iterdir()):
        assert child.poll() is None and time.monotonic() < deadline, "the child never began to save step 2"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert any("tmp" in file.name for file in tmp_path.iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        assert [file.name for file in tmp_path.iterdir()] == ["1"]
        found, step = checkpoints.restore({"x": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert step == 1
    np.testing.assert_array_equal(found["x"], np.arange(8.0))
