"""The benchmark of `grouped_matmul`: its cases, its oracle, its peers, its rates."""

import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.ceilings import Ceilings, measure_ceilings
from dynamoe.kernels.grouped_matmul import bench, cases, operands, peers
from dynamoe.kernels.grouped_matmul.cases import Case
from dynamoe.kernels.grouped_matmul.shapes import MODELS, Shape, model_loads, model_shape
from dynamoe.kernels.measuring import Call, Contender, in_turns, ratio
from dynamoe.kernels.quantized import dequantize

SIZES = np.array([11, 0, 9], np.int32)
TRAINING = Case("models", Shape(24, 8, 12), "skewed", SIZES, "tiny", "training", "up")
DECODE = Case("decode", Shape(24, 8, 12), "drawn", SIZES)


def test_models_have_their_published_sizes_and_products_of_both_projections():
    assert model_shape("OLMoE", "decode", "up", 1) == (64 * 8, 2048, 1024)
    assert model_shape("OLMoE", "training", "down", 8) == (8192, 128, 256)
    assert model_shape("Mixtral-8x7B", "prefill", "up", 1) == (2048 * 2, 4096, 14336)
    assert [model.experts for model in MODELS.values()] == [8, 64, 128, 256]


def test_measured_loads_are_a_models_own_or_said_to_be_resampled():
    counts = {"OLMoE, c4": np.arange(64), "Mixtral, c4": np.arange(8)}
    assert model_loads("Mixtral-8x7B", counts)["Mixtral, c4"].tolist() == list(range(8))
    assert model_loads("OLMoE", counts)["OLMoE, c4"].tolist() == list(range(64))
    resampled = model_loads("DeepSeek-V3", counts)["OLMoE, c4, resampled"]
    np.testing.assert_allclose(np.sort(resampled), np.linspace(0, 63, 256))
    assert model_loads("Qwen3-30B-A3B", {})["skewed"][[0, 127]].tolist() == [1, 1 / 128]


def test_every_case_hands_out_its_rows_and_quick_is_a_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DYNAMOE_DATA", raising=False)
    monkeypatch.setattr(cases, "memory_bytes", lambda: 1e15)
    full, notes = cases.cases(quick=False)
    for case in full:
        assert case.sizes.sum() == case.shape.rows and case.sizes.dtype == np.int32
        assert len(case.sizes) > 1 and set(case.passes) <= set(cases.PASSES)
    assert {str(case) for case in cases.cases(quick=True)[0]} < {str(case) for case in full}
    assert {case.kind for case in full} == {"experts", "layer", "decode", "models"}
    assert any("divided by 8 on CPU: DeepSeek-V3 / 8, Mixtral-8x7B / 8, OLMoE / 8" in note for note in notes)
    assert any("prefill" in note for note in notes) and not any(case.phase == "prefill" for case in full)


def test_cases_are_chosen_by_kind_and_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DYNAMOE_DATA", raising=False)
    assert {case.kind for case in cases.cases(False, ("layer", "decode"))[0]} == {"layer", "decode"}
    chosen = cases.cases(False, ("models",), "OLMoE")[0]
    assert {case.model for case in chosen} == {"OLMoE / 8"}
    assert {case.phase for case in chosen} == {"decode", "prefill", "training"}


def test_a_case_that_memory_does_not_hold_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "memory_bytes", lambda: 1e9)
    found, notes = cases.cases(False, ("models",), "DeepSeek-V3")
    assert {case.phase for case in found} == {"decode", "prefill"}
    large = (
        "models DeepSeek-V3 / 8 training up 8192x896x256 256 even is left out: it needs about 1.1 GB, 1.0 GB are there"
    )
    assert large in notes


def test_packed_weights_are_for_decoding_and_integers_for_inference():
    def names(case: Case, which: str) -> list[str]:
        return [numbers.name for numbers in case.numbers(which)]

    assert names(TRAINING, "forward") == names(TRAINING, "dw") == ["float32", "bfloat16"]
    assert names(DECODE, "forward") == ["float32", "bfloat16", "int8", "int4", "int8 x int8"]
    assert names(TRAINING._replace(phase="prefill"), "forward") == ["float32", "bfloat16", "int8 x int8"]


@pytest.mark.parametrize("which", cases.PASSES)
def test_the_oracle_is_a_loop_over_rows(which: str):
    given = operands.operands(operands.numbers_here()[0], TRAINING.shape, SIZES)
    x, w, dy = (np.asarray(array, np.float64) for array in (given.x, given.w, given.dy))
    group = np.repeat(np.arange(3), SIZES)
    expected = {"forward": np.zeros(dy.shape), "dx": np.zeros(x.shape), "dw": np.zeros(w.shape)}
    for row, e in enumerate(group):
        expected["forward"][row] = x[row] @ w[e]
        expected["dx"][row] = w[e] @ dy[row]
        expected["dw"][e] += np.outer(x[row], dy[row])
    columns = np.array([0, 3, 7])
    np.testing.assert_allclose(operands.in_float64(which, given, SIZES, columns), expected[which][..., columns])


def test_the_oracle_of_packed_operands_is_of_what_they_stand_for():
    integers = operands.numbers_here()[-1]
    given = operands.operands(integers, DECODE.shape, SIZES)
    x = np.asarray(given.x.codes, np.float64) * np.asarray(given.x.scales)
    expected = x[:11] @ np.asarray(dequantize(given.w), np.float64)[0]
    found = operands.in_float64("forward", given, SIZES, np.arange(12))
    np.testing.assert_allclose(found[:11], expected)
    assert not found[20:].any()


def test_every_row_of_a_large_result_is_checked_in_columns_from_the_first_to_the_last():
    columns = operands.checked_columns("dx", Shape(65536, 7168, 2048))
    assert len(columns) == operands.CHECKED_COLUMNS and columns[0] == 0 and columns[-1] == 7167
    assert len(operands.checked_columns("forward", Shape(4096, 512, 256))) == 256


def test_a_wrong_pass_is_found_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch):
    def product(*given: Any, implementation: str) -> jax.Array:
        if implementation == "refuses":
            raise NotImplementedError("x is too good")
        return grouped_matmul(*given, implementation="reference") * 1.001

    monkeypatch.setattr(bench, "IMPLEMENTATIONS", {"wrong": None, "refuses": None})
    monkeypatch.setattr(bench, "grouped_matmul", product)
    monkeypatch.setattr(bench, "available", lambda: {})
    floats = operands.numbers_here()[:1]
    monkeypatch.setattr(cases, "numbers_here", lambda: floats)
    bench.compiled_pass.cache_clear()
    found = list(bench.checks(TRAINING))
    bench.compiled_pass.cache_clear()
    assert [(str(c.contender), c.which) for c in found if c.wrong] == [("wrong", which) for which in cases.PASSES]
    assert {c.refusal for c in found if c.contender.name == "refuses"} == {"x is too good"}


def test_a_peer_that_fails_is_named_with_its_reason_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Call:
        raise RuntimeError("no such GPU\nand a long trace")

    monkeypatch.setattr(bench, "IMPLEMENTATIONS", {})
    monkeypatch.setattr(
        bench, "available", lambda: {"broken": peers.Peer(("cpu",), "jax", fail), "dense": peers.PEERS["dense"]}
    )
    found = [check for check in bench.checks(DECODE) if check.contender.main]
    assert [(c.contender.name, c.error, c.refusal) for c in found] == [
        ("broken", None, "no such GPU"),
        ("dense", None, ""),
    ]
    seconds, failed = bench.seconds(DECODE, "forward", [check.contender for check in found], rounds=2)
    assert [str(contender) for contender in seconds] == ["dense"] and [c.refusal for c in failed] == ["no such GPU"]


@pytest.mark.parametrize("which", cases.PASSES)
def test_megablox_is_called_as_its_kernels_want(which: str):
    sizes = np.array([100, 0, 156], np.int32)
    given = operands.operands(operands.numbers_here()[0], Shape(256, 128, 256), sizes)
    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(lambda *o: peers.megablox(*o, interpret=True)(which))(*given)
    expected = operands.in_float64(which, given, sizes, np.arange(found.shape[-1]))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_tokamax_is_called_by_its_documented_name(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def ragged_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, implementation: str) -> jax.Array:
        asked.append(implementation)
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    monkeypatch.setitem(__import__("sys").modules, "tokamax", SimpleNamespace(ragged_dot=ragged_dot))
    given = operands.operands(operands.numbers_here()[0], TRAINING.shape, SIZES)
    for which in cases.PASSES:
        found = peers.PEERS["tokamax triton"].call(which, operands.numbers_here()[0], given, TRAINING.shape)()
        columns = np.arange(found.shape[-1])
        np.testing.assert_allclose(found, operands.in_float64(which, given, SIZES, columns), atol=1e-4)
    assert set(asked) == {"triton"}


def test_peers_that_are_not_here_have_a_reason():
    reasons = peers.absent()
    assert reasons["megablox"] == "it is for tpu" and reasons["tokamax triton"] == "it is for gpu and tpu"
    assert set(reasons) | set(peers.available()) == set(peers.PEERS) and "dense" in peers.available()


def test_decoding_is_judged_by_the_bytes_of_matrices_with_rows_and_the_rest_by_operations():
    ceilings = Ceilings({"float32": 2e9, "bfloat16": 4e9, "int8": 8e9}, 1e9)
    native = Contender("native", "float32")
    decoding = bench.rates(DECODE, "forward", native, 1e-6, ceilings)
    assert decoding["rate"] == pytest.approx(2 * 8 * 12 * 4 / 1e3) and decoding["unit"] == "GB/s of weights"
    int4 = bench.rates(DECODE, "forward", Contender("native", "int4", main=False), 1e-6, ceilings)
    assert int4["rate"] == pytest.approx(2 * 12 * (8 / 2 + 4) / 1e3)  # codes, and one scale for 8 rows of D
    training = bench.rates(TRAINING, "dw", native, 1e-6, ceilings)
    assert training == {"rate": pytest.approx(3.84), "unit": "GFLOP/s", "percent_of_ceiling": pytest.approx(192.0)}
    assert bench.rates(TRAINING, "dw", native, 1e-6, None)["percent_of_ceiling"] is None


def test_ceilings_are_of_each_kind_of_number():
    found = measure_ceilings(["float32", "int8", "float32"], side=8)
    assert list(found.flops) == ["float32", "int8"] and min(*found.flops.values(), found.bytes) > 0
    assert "int8" in str(found) and "copy" in str(found)


def test_the_median_ratio_is_of_times_in_the_same_round():
    ours, theirs = np.array([2.0, 30.0, 5.0]), np.array([1.0, 10.0, 5.0])
    assert ratio(ours, theirs) == (2.0, 2.0)
    calls: Iterator[int] = itertools.count()
    seconds = in_turns({"a": Call(functools.partial(next, calls), lambda _: None)}, rounds=3)
    assert seconds["a"].shape == (3,) and (seconds["a"] >= 0).all() and next(calls) == 6


def test_numbers_of_an_accelerator_are_bfloat16_and_what_stands_for_it():
    assert {numbers.dtype for numbers in operands.numbers_on("tpu")} == {"bfloat16"}
    assert jnp.dtype(operands.numbers_on("cpu")[0].dtype) == jnp.float32
