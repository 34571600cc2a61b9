"""`dynamoe bench` checks results, then prints ratios."""

import dataclasses
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import standard_library, standard_library_dense
from dynamoe.kernels import sort_by_expert
from dynamoe.kernels.grouped_matmul import api, bench
from dynamoe.kernels.grouped_matmul.shapes import Shape
from dynamoe.kernels.token_permute import bench as token_permute
from dynamoe.kernels.token_permute.api import PERMUTES, SORTS
from dynamoe.models import Decoder
from dynamoe.moe import DroplessDispatcher

Dynamoe = Callable[..., tuple[int, str, str]]

TINY = [
    bench.Case("experts", Shape(20, 6, 4), "skewed", np.array([11, 0, 9], np.int32)),
    bench.Case("decode", Shape(6, 4, 3), "drawn", np.array([2, 4], np.int32)),
]


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cases", lambda quick: TINY[:1] if quick else TINY)
    monkeypatch.setattr(bench, "peers", lambda: ("dense",))
    monkeypatch.delenv("DYNAMOE_DATA", raising=False)
    bench.compiled_pass.cache_clear()


def test_prints_errors_then_ratios_then_their_means(dynamoe: Dynamoe) -> None:
    status, output, errors = dynamoe("bench", "grouped_matmul", "--rounds", "1")
    assert (status, errors) == (0, "")
    lines = [line.split() for line in output.splitlines() if line]
    for name in bench.runnable():
        assert sum(line[:5] == ["experts", "20x6x4", "3", "skewed", name] for line in lines) == 1
    timed = [line for line in lines if line[4:5] in (["forward"], ["dx"], ["dw"])]
    assert [line[4] for line in timed] == ["forward", "dx", "dw", "forward"]
    assert all(len(line) == 5 + len(bench.runnable()) and line[-1] == "1.00" and float(line[5]) > 0 for line in timed)
    assert [line for line in lines if line[:3] == ["decode", "forward", "dense"]] == [
        ["decode", "forward", "dense", "1", "1.00", "1.00"]
    ]
    assert output.index("all correct") < output.index("time, dense = 1") < output.index("over all cases of a kind")


def test_says_what_is_left_out(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "AFFORDABLE", 500.0)
    status, output, errors = dynamoe("bench", "--quick", "--rounds", "1")
    assert (status, errors) == (0, "")
    assert "DYNAMOE_DATA is not set: the rows with counts of OLMoE and Mixtral are left out" in output
    assert "torch is not installed: times are multiples of one dense product by JAX" in output
    assert "xla and reference, which cost E times too much here, are left out above 5e+02 FLOPs" in output
    assert "decode" not in output.split("all correct")[1]


def test_a_wrong_result_has_status_1_and_is_not_timed(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda x, w, sizes: 1.01 * jax.lax.ragged_dot(x, w, sizes))
    status, output, _ = dynamoe("bench", "--quick")
    assert status == 1
    assert "WRONG" in output and "a result is wrong: nothing is timed" in output and "time," not in output


def test_rounds_out_of_range_are_refused(dynamoe: Dynamoe) -> None:
    status, output, errors = dynamoe("bench", "--rounds", "0")
    assert (status, output) == (2, "")
    assert "rounds is 0; it must be at least 1" in " ".join(errors.replace("│", "").split())


def test_the_real_cases_hold_each_rows_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for case in bench.cases(quick=False):
        assert case.sizes.sum() == case.shape.rows and case.sizes.dtype == np.int32
        assert set(case.passes) <= set(bench.PASSES) and "blocked" in case.implementations
    assert {str(case) for case in bench.cases(quick=True)} < {str(case) for case in bench.cases(quick=False)}


@pytest.fixture
def recipes(tiny: Callable[..., Experiment], dense_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = tiny()
    dropless = dataclasses.replace(mixture.model.ffn, dispatcher=DroplessDispatcher())
    model = dataclasses.replace(mixture.model, ffn=dropless)
    monkeypatch.setattr(standard_library, "recipe", lambda: dataclasses.replace(mixture, model=model))
    monkeypatch.setattr(standard_library_dense, "recipe", lambda: dataclasses.replace(mixture, model=dense_model))


def test_a_training_step_is_compared_with_every_expert_on_every_token_and_then_timed(
    dynamoe: Dynamoe, recipes: None
) -> None:
    status, output, errors = dynamoe("bench", "training_step", "--rounds", "1")
    assert (status, errors) == (0, "")
    loss, norm, dense, mixture, ratio = output.splitlines()
    for line in (loss, norm):
        found, expected = (float(number) for number in re.findall(r"\d+\.\d+", line))
        assert found == pytest.approx(expected, rel=1e-4) and found > 0
    assert "FLOPs per token" in dense and "FLOPs per token" in mixture
    assert re.search(r"takes \d+\.\d\d times the dense model's", ratio)


def test_a_step_that_differs_from_that_of_every_expert_on_every_token_is_not_timed(
    dynamoe: Dynamoe, recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DroplessDispatcher.combine
    monkeypatch.setattr(DroplessDispatcher, "combine", lambda *arguments: 1.01 * right(*arguments))
    status, output, _ = dynamoe("bench", "training_step")
    assert status == 1 and "nothing is timed" in output and "times the dense" not in output


def test_a_token_permutation_is_checked_and_then_timed(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_permute, "MODELS", {"tiny": token_permute.Shape(5, 2, 3)})
    monkeypatch.setattr(token_permute, "SORTED", (64,))
    monkeypatch.setattr(token_permute, "MOVED", 64)
    monkeypatch.setattr(token_permute, "peers", lambda: ("jax",))
    status, output, errors = dynamoe("bench", "token_permute", "--rounds", "1")
    assert (status, errors) == (0, "")
    checks, times = output.split("all correct")
    assert "WRONG" not in checks and "torch is not installed" in checks
    checked = {tuple(line.split()[:6]) for line in checks.splitlines()}
    assert {("sort", "tiny", "64", "5", "3", name) for name in SORTS} <= checked
    assert {("move", "tiny", "64", "5", "3", name) for name in PERMUTES} <= checked
    timed = [line.split()[5] for line in times.splitlines() if line.split()[2:3] == ["64"]]
    assert timed == list(token_permute.PASSES)


def test_a_sort_that_is_not_stable_is_not_timed(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_permute, "MODELS", {"tiny": token_permute.Shape(5, 2, 3)})
    monkeypatch.setattr(token_permute, "SORTED", (64,))
    monkeypatch.setattr(token_permute, "MOVED", 64)
    monkeypatch.setitem(
        SORTS, "xla", lambda expert, experts: sort_by_expert(expert[::-1], experts, implementation="counting")
    )
    token_permute.compiled_pass.cache_clear()
    status, output, _ = dynamoe("bench", "token_permute", "--quick")
    token_permute.compiled_pass.cache_clear()
    assert status == 1 and "inf WRONG" in output and "time," not in output
