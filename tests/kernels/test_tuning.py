"""The autotuner takes the fastest tiles that are right, and its table is read again."""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels.grouped_matmul import tuned
from dynamoe.kernels.grouped_matmul.cases import Case
from dynamoe.kernels.grouped_matmul.mosaic_gpu_kernels import walk
from dynamoe.kernels.grouped_matmul.passes import Pass, pass_of
from dynamoe.kernels.grouped_matmul.reference import grouped_matmul_reference
from dynamoe.kernels.grouped_matmul.shapes import Shape
from dynamoe.kernels.grouped_matmul.triton_kernels import tiles
from dynamoe.kernels.grouped_matmul.triton_kernels.tiles import (
    GpuTiles,
    candidates,
    choose_tiles,
    rule,
    shared_bytes,
)
from dynamoe.kernels.grouped_matmul.tuned import Key, table_file, tuned_tiles
from dynamoe.kernels.grouped_matmul.tuning import Tunable, tune, write_table
from dynamoe.kernels.quantized import INT4, MXFP4, NF4, Format, quantize

CASE = Case("decode", Shape(24, 16, 8), "even", np.array([10, 0, 14], np.int32))
WORK = Pass(rows=65536, depth=2048, columns=1024, groups=64, bits=16, matrix_bits=16)


def sleeping(seconds: dict[GpuTiles, float], wrong: GpuTiles | None = None) -> Tunable:
    """Takes as long as it is told, by tiles; None: does not run."""

    def multiply(x: jax.Array, w: Any, sizes: jax.Array, tiles: GpuTiles) -> jax.Array:
        if seconds[tiles] < 0:
            raise ValueError("too much shared memory\nsecond line")

        def wait(y: np.ndarray) -> np.ndarray:
            time.sleep(seconds[tiles])
            return y

        y = grouped_matmul_reference(x, w, sizes) * (2.0 if tiles == wrong else 1.0)
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

    return Tunable(lambda work: list(seconds), multiply)


def numbers_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tuned_numbers(CASE)[:1]
    monkeypatch.setattr(Case, "numbers", lambda self, which: one)


def tuned_numbers(case: Case) -> Any:
    return case.numbers("forward")


def test_the_fastest_is_written_and_found_again(monkeypatch, tmp_path):
    numbers_of_one_kind(monkeypatch)
    slow, fast, broken = GpuTiles(16, 16, 16), GpuTiles(32, 16, 16), GpuTiles(64, 16, 16)
    (found,) = tune([CASE], 2, {"triton": sleeping({slow: 0.02, fast: 0.0, broken: -1.0})})
    assert found.tiles == fast and found.tried == 2 and found.gain > 2
    assert found.failed == (f"{tuple(broken)}: too much shared memory",)
    file = write_table([found], table_file("NVIDIA H200", tmp_path))
    assert file.name == "nvidia_h200.json" and json.loads(file.read_text())["versions"]["jax"] == jax.__version__
    work = pass_of("forward", jnp.zeros((30, 16)), jnp.zeros((3, 16, 8)), jnp.zeros((30, 8)))
    assert tuned_tiles(Key.of("triton", work), "NVIDIA H200", GpuTiles, tmp_path) == fast
    assert tuned_tiles(Key.of("triton", work), "NVIDIA A100-SXM4-40GB", GpuTiles, tmp_path) is None
    transposed = pass_of("dx", jnp.zeros((30, 8)), jnp.zeros((3, 8, 16)), jnp.zeros((30, 16)))
    assert tuned_tiles(Key.of("triton", transposed), "NVIDIA H200", GpuTiles, tmp_path) is None


def test_a_wrong_result_ends_it(monkeypatch):
    numbers_of_one_kind(monkeypatch)
    right, wrong = GpuTiles(16, 16, 16), GpuTiles(32, 16, 16)
    with pytest.raises(ArithmeticError, match="triton with GpuTiles.rows=32.* is wrong by 1.0e.00, allowed is 1e-05"):
        list(tune([CASE], 1, {"triton": sleeping({right: 0.0, wrong: 0.0}, wrong)}))


def test_where_nothing_runs_it_says_why(monkeypatch):
    numbers_of_one_kind(monkeypatch)
    with pytest.raises(RuntimeError, match="no tiles of triton run here: .*too much shared memory"):
        list(tune([CASE], 1, {"triton": sleeping({GpuTiles(16, 16, 16): -1.0})}))


def test_rows_replace_those_of_their_key_and_others_stay(tmp_path):
    file = tmp_path / "card.json"
    ours, others = Key.of("triton", WORK), Key.of("triton", Pass(**{**vars(WORK), "groups": 8}))
    tuned.write_rows(file, {ours: {"rows": 1}, others: {"rows": 2}}, {})
    tuned.write_rows(file, {ours: {"rows": 3}}, {"jax": "1"})
    rows = {row["groups"]: row["tiles"]["rows"] for row in json.loads(file.read_text())["rows"]}
    assert rows == {64: 3, 8: 2} and [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_a_file_that_is_no_table_is_named_and_left(tmp_path):
    file = tmp_path / "card.json"
    file.write_text('{"rows": [{"tiles": 1, "depth": 2}]}')
    with pytest.raises(ValueError, match=r"card.json is no table of tiles"):
        tuned.write_rows(file, {Key.of("triton", WORK): {"rows": 1}}, {})
    assert file.read_text().startswith('{"rows": [{"tiles": 1')


@pytest.mark.parametrize("rows", [24, 8192, 65536])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
def test_candidates_fit_into_a_block_and_differ(rows, outer, bits):
    work = Pass(rows=rows, depth=2048, columns=1024, groups=64, bits=bits, matrix_bits=bits, outer=outer)
    found = list(candidates(work))
    assert found[0] == rule(work) and len(set(found)) == len(found) > 4
    for one in found:
        assert shared_bytes(work, one) <= 232448
        assert all(size & (size - 1) == 0 and size >= 16 for size in one[:3])


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(2048, 1024), (192, 320)])
def test_candidates_for_hopper_divide_the_columns(outer, depth, columns):
    work = Pass(rows=8192, depth=depth, columns=columns, groups=64, bits=16, matrix_bits=16, outer=outer)
    found = list(walk.candidates(work))
    assert len(set(found)) == len(found) > 1
    assert all(columns % tile.columns == 0 and tile.stages >= 2 for tile in found)
    assert not outer or all(depth % tile.rows == 0 for tile in found)


def test_a_row_of_one_format_is_not_taken_for_another(monkeypatch, tmp_path):
    def work_of(format: Format, group_size: int | None) -> Pass:
        w = quantize(jnp.ones((3, 128, 64)), format, group_size=group_size)
        return pass_of("forward", jnp.zeros((24, 128)), w, jnp.zeros((24, 64)))

    written = work_of(INT4, 128)
    file = table_file("NVIDIA H200", tmp_path)
    tuned.write_rows(file, {Key.of("triton", written): GpuTiles(16, 128, 64)._asdict()}, {})
    for format, group_size in ((INT4, 32), (MXFP4, None), (NF4, None)):
        assert tuned_tiles(Key.of("triton", work_of(format, group_size)), "NVIDIA H200", GpuTiles, tmp_path) is None
    assert tuned_tiles(Key.of("triton", written), "NVIDIA H200", GpuTiles, tmp_path) == GpuTiles(16, 128, 64)
    # And a row that does not fit its own pass is cut to it.
    monkeypatch.setattr(tiles, "tuned_tiles", lambda *_: GpuTiles(16, 128, 64))
    assert choose_tiles(work_of(INT4, 32)).depth == 32


def test_a_row_with_other_tiles_is_named(tmp_path):
    tuned.write_rows(table_file("card", tmp_path), {Key.of("triton", WORK): {"lanes": 3}}, {})
    with pytest.raises(ValueError, match="card.json has other tiles than GpuTiles"):
        tuned_tiles(Key.of("triton", WORK), "card", GpuTiles, tmp_path)


def test_tiles_of_packed_matrices_lie_in_one_group_of_scales():
    w = quantize(jnp.ones((3, 96, 64)), INT4, group_size=32)
    x, dy = jnp.zeros((24, 96)), jnp.zeros((24, 64))
    assert all(one.depth <= 32 for one in candidates(pass_of("forward", x, w, dy)))
    assert all(one.columns <= 32 for one in candidates(pass_of("dx", x, w, dy)))
