"""The grouped matmul for TPU, interpreted: its plan of visits against plain Python, its kernels against float64.

Two interpreters of Pallas: the plain one (`True`), fast enough for Hypothesis, and the one that simulates a TPU's
memories, two cores, copies and races. `test_grouped_matmul.py` runs it among all implementations.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.grouped_matmul.mosaic_tpu import grouped_matmul_mosaic_tpu
from dynamoe.kernels.grouped_matmul.tiles import Pass, Tiles, choose_tiles, vmem_bytes, vmem_limit
from dynamoe.kernels.grouped_matmul.visits import Visits, visits_by_group, visits_by_tile

ROWS, GROUPS, INNER, WIDTH = 27, 4, 13, 7
"""The last tile of each axis reaches past the edge of the array."""
TILES = Tiles(8, 5, 4)
PLANS = [(27, 4, 8), (16, 1, 8), (3, 6, 8), (40, 9, 5)]
"""Rows, groups and rows of a tile."""


def sizes_of(cuts: Sequence[int], rows: int) -> np.ndarray:
    return np.diff(np.minimum(sorted(cuts), rows), prepend=0).astype(np.int32)


def cuts(rows: int, groups: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, rows), min_size=groups, max_size=groups)


def owners(sizes: np.ndarray, rows: int) -> list[int | None]:
    """The group of each row."""
    found: list[int | None] = np.repeat(np.arange(len(sizes)), sizes).tolist()
    return found + [None] * (rows - len(found))


@functools.cache
def compiled_plan(by_group: bool, rows: int, tile: int) -> Callable[[np.ndarray], Visits]:
    visits = visits_by_group if by_group else visits_by_tile
    return jax.jit(lambda sizes: visits(sizes, rows, tile))


def plan(by_group: bool, sizes: np.ndarray, rows: int, tile: int) -> list[dict[str, int]]:
    """The visits that are not left over; those that are must repeat the last and own nothing."""
    visits = compiled_plan(by_group, rows, tile)(sizes)
    count = int(visits.count)
    names = Visits._fields[:-1]
    columns = [np.asarray(getattr(visits, name)).tolist() for name in names]
    steps = [dict(zip(names, step, strict=True)) for step in zip(*columns, strict=True)]
    for left_over in steps[count:]:
        assert left_over == {**steps[count - 1], "start": 0, "end": 0}
    return steps[:count]


@pytest.mark.parametrize(("rows", "groups", "tile"), PLANS)
@given(data=st.data())
def test_each_tile_is_visited_by_each_group_that_owns_rows_in_it(rows, groups, tile, data):
    sizes = sizes_of(data.draw(cuts(rows, groups)), rows)
    of_row = owners(sizes, rows)
    expected = []
    for first in range(0, rows, tile):
        here = [group for group in range(groups) if group in of_row[first : first + tile]]
        expected += [(first // tile, group) for group in here or [None]]
    found = plan(False, sizes, rows, tile)
    assert len(found) == len(expected) <= -(-rows // tile) + groups - 1
    before = None
    for step, (target, group) in zip(found, expected, strict=True):
        assert step["target"] == target
        if group is None:
            assert step["start"] == step["end"]
            assert before is None or (step["group"], step["source"]) == (before["group"], before["source"])
        else:
            assert (step["group"], step["source"]) == (group, target)
            assert all((of_row[row] == group) == (step["start"] <= row < step["end"]) for row in range(rows))
        before = step


@pytest.mark.parametrize(("rows", "groups", "tile"), PLANS)
@given(data=st.data())
def test_each_group_visits_its_tiles_and_an_empty_one_is_visited_once(rows, groups, tile, data):
    sizes = sizes_of(data.draw(cuts(rows, groups)), rows)
    of_row = owners(sizes, rows)
    expected = []
    for group in range(groups):
        tiles = [first // tile for first in range(0, rows, tile) if group in of_row[first : first + tile]]
        expected += [(group, source) for source in tiles or [None]]
    found = plan(True, sizes, rows, tile)
    assert len(found) == len(expected) <= -(-rows // tile) + groups - 1
    for step, (group, source) in zip(found, expected, strict=True):
        assert step["group"] == group and 0 <= step["source"] < -(-rows // tile)
        if source is None:
            assert step["start"] == step["end"]
        else:
            assert step["source"] == source
            assert all((of_row[row] == group) == (step["start"] <= row < step["end"]) for row in range(rows))


@pytest.mark.parametrize("by_group", [False, True])
def test_sizes_that_break_their_bounds_visit_no_tile_outside(by_group):
    for sizes in ([100, 1, 1, 1], [-5, 40, -3, 2], [2**31 - 1, 0, 0, 0]):
        for step in plan(by_group, np.array(sizes, np.int32), 27, 8):
            assert 0 <= step["source"] < 4 and 0 <= step["target"] < 4 and 0 <= step["group"] < 4


def test_work_does_not_grow_with_the_number_of_groups():
    few, many = np.full(8, 512, np.int32), np.zeros(256, np.int32)
    many[::32] = 512
    assert len(plan(False, few, 4096, 128)) == len(plan(False, many, 4096, 128)) == 32
    # dw of an empty group is zeros that someone has to write; no rows are read for them
    assert [len([s for s in plan(True, e, 4096, 128) if s["end"] > s["start"]]) for e in (few, many)] == [32, 32]


def operands(groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and dy."""
    random = np.random.default_rng(0)
    shapes = (ROWS, INNER), (groups, INNER, WIDTH), (ROWS, WIDTH)
    x, w, dy = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, w, dy


@jax.jit
def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> list[jax.Array]:
    """y, dx and dw."""
    y, back = jax.vjp(lambda x, w: grouped_matmul_mosaic_tpu(x, w, sizes, TILES), x, w)
    return [y, *back(dy)]


def assert_right(sizes: np.ndarray) -> None:
    """Against float64, with NaN in every row of nobody."""
    x, w, dy = operands(len(sizes))
    x64, w64, dy64 = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros_like(dy64), np.zeros_like(x64), np.zeros_like(w64)
    for row, group in enumerate(owners(sizes, ROWS)):
        if group is not None:
            y[row], dx[row] = x64[row] @ w64[group], w64[group] @ dy64[row]
            dw[group] += np.outer(x64[row], dy64[row])
    x, dy = (array.at[sizes.sum() :].set(jnp.nan) for array in (x, dy))
    for name, found, expected in zip(("y", "dx", "dw"), run(x, w, dy, jnp.asarray(sizes)), (y, dx, dw), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


@given(cuts=cuts(ROWS, GROUPS))
def test_any_group_sizes_are_right(cuts):
    with pltpu.force_tpu_interpret_mode(True):
        assert_right(sizes_of(cuts, ROWS))


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (ROWS, 0, 0, 0), (0, 0, 0, ROWS), (0, 0, 0, 3), (8, 8, 8, 3)])
def test_empty_groups_one_group_and_whole_tiles_are_right(sizes):
    with pltpu.force_tpu_interpret_mode(True):
        assert_right(np.array(sizes, np.int32))


def test_many_more_groups_than_rows_are_right():
    sizes = np.zeros(256, np.int32)
    sizes[[0, 3, 100, 101, 255]] = 5, 1, 9, 2, 7
    with pltpu.force_tpu_interpret_mode(True):
        assert_right(sizes)


def test_a_simulated_tpu_with_two_cores_agrees_and_finds_no_race(monkeypatch):
    found = []

    def recorded(**cores: int) -> RaceDetectionState:
        found.append(RaceDetectionState(**cores))
        return found[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", recorded)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        assert_right(np.array([5, 0, 9, 2], np.int32))
    # JAX itself only prints a race. One state for each of the three kernels.
    assert [state.races_found for state in found] == [False] * 3


def test_other_group_sizes_do_not_compile_again():
    with pltpu.force_tpu_interpret_mode(True):
        assert_right(np.array([1, 2, 3, 4], np.int32))
        before = run._cache_size()
        assert_right(np.array([20, 0, 0, 5], np.int32))
        assert run._cache_size() == before


def test_a_platform_that_is_no_tpu_is_named():
    with pytest.raises(NotImplementedError, match="mosaic_tpu is for TPU; the platform is cpu"):
        grouped_matmul(jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3]), implementation="mosaic_tpu")


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "groups"),
    [(8192, 4096, 14336, 8), (8192, 14336, 4096, 8), (16, 7168, 2048, 256), (333, 77, 130, 5), (10**6, 64, 64, 64)],
)
def test_chosen_tiles_fit_the_arrays_and_the_memory(rows, depth, columns, groups, bits, outer):
    work = Pass(rows=rows, depth=depth, columns=columns, groups=groups, bits=bits, matrix_bits=bits, outer=outer)
    tiles = choose_tiles(work)
    assert tiles == tiles.clipped(rows, depth, columns)
    assert vmem_bytes(work, tiles) <= vmem_limit()
    # a block is a whole axis, or whole vector registers of it
    assert all(size == whole or size % 128 == 0 for size, whole in zip(tiles, (rows, depth, columns), strict=True))


def test_tiles_of_packed_matrices_keep_their_units_or_are_whole():
    work = Pass(rows=512, depth=3072, columns=2816, groups=8, bits=16, matrix_bits=4, depth_unit=1024)
    assert choose_tiles(work).depth in (1024, 2048, 3072)
    assert choose_tiles(replace(work, depth_unit=4096)).depth == 3072
    assert choose_tiles(replace(work, depth_unit=1, column_unit=4096)).columns == 2816
    assert choose_tiles(replace(work, bits=8, matrix_bits=8, depth_unit=32, deepest=1024)).depth <= 1024
