"""`dynamoe bench` checks results, then prints ratios."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from dynamoe.experiments.commands import bench as bench_command
from dynamoe.experiments.commands import bench_compile, bench_tune
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import standard_library, standard_library_dense
from dynamoe.kernels import sort_by_expert
from dynamoe.kernels.aot import Report
from dynamoe.kernels.ceilings import Ceilings
from dynamoe.kernels.grouped_matmul import api, bench, peers
from dynamoe.kernels.grouped_matmul.cases import Case
from dynamoe.kernels.grouped_matmul.passes import Pass
from dynamoe.kernels.grouped_matmul.shapes import Shape
from dynamoe.kernels.grouped_matmul.triton_kernels.tiles import GpuTiles
from dynamoe.kernels.grouped_matmul.tuned import Key
from dynamoe.kernels.grouped_matmul.tuning import Tuned
from dynamoe.kernels.token_permute import bench as token_permute
from dynamoe.kernels.token_permute.api import PERMUTES, SORTS
from dynamoe.models import Decoder
from dynamoe.moe import DroplessDispatcher

Dynamoe = Callable[..., tuple[int, str, str]]

TINY = [
    Case("experts", Shape(20, 6, 4), "skewed", np.array([11, 0, 9], np.int32)),
    Case("decode", Shape(6, 4, 3), "drawn", np.array([2, 4], np.int32)),
]
CEILINGS = Ceilings({"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, 1e9)
LEFT_OUT = "experts 1x1x1 1 even is left out: it needs about 9.0 GB, 1.0 GB are there"


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cases", lambda quick, kinds, model: (TINY[:1] if quick else TINY, [LEFT_OUT]))
    monkeypatch.setattr(bench, "available", lambda: {"dense": peers.PEERS["dense"]})
    monkeypatch.setattr(bench, "measure_ceilings", lambda units: CEILINGS)
    monkeypatch.setattr(bench, "implementations", lambda platform: ("blocked", "xla"))
    monkeypatch.delenv("DYNAMOE_DATA", raising=False)
    bench.compiled_pass.cache_clear()


def test_prints_errors_then_ratios_then_their_means_and_writes_a_line_for_each_contender(
    dynamoe: Dynamoe, tmp_path: Path
) -> None:
    file = tmp_path / "bench.jsonl"
    status, output, errors = dynamoe("bench", "grouped_matmul", "--rounds", "2", "--output", str(file))
    assert (status, errors) == (0, "")
    assert output.index("all correct") < output.index("time, dense = 1") < output.rindex("over all cases of a kind")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {(line["case"], line["pass"], line["contender"]): line for line in lines}
    assert len(found) == len(lines)
    packed = ("bfloat16", "int8", "int4", "int8 x int8")
    decoding = {"blocked", "xla", "dense", "dense bfloat16", *(f"blocked {numbers}" for numbers in packed)}
    assert {name for case, _, name in found if case == "decode 6x4x3 2 drawn"} == decoding
    assert {which for case, which, _ in found if case == "experts 20x6x4 3 skewed"} == {"forward", "dx", "dw"}
    line = found["decode 6x4x3 2 drawn", "forward", "blocked int4"]
    assert (line["kind"], line["numbers"], line["name"], line["rounds"]) == ("decode", "int4", "blocked", 2)
    assert line["shape"] == {"rows": 6, "inner": 4, "width": 3} and line["group_sizes"] == [2, 4]
    assert line["seconds"]["median"] >= line["seconds"]["fastest"] > 0
    assert line["unit"] == "GB/s of weights" and line["percent_of_ceiling"] == pytest.approx(100 * line["rate"])
    assert line["ratio"]["dense"]["median"] > 0 and line["ratio"]["dense"]["fastest"] > 0
    assert (line["platform"], line["device"]) == ("cpu", jax.devices()[0].device_kind)
    assert {"python", "jax", "jaxlib"} <= set(line["versions"]) and line["date"].startswith("20")
    assert found["decode 6x4x3 2 drawn", "forward", "dense"]["ratio"]["dense"] == {"median": 1.0, "fastest": 1.0}
    assert found["experts 20x6x4 3 skewed", "dw", "xla"]["unit"] == "GFLOP/s"
    assert re.search(r"experts 20x6x4 3 skewed +dw +float32 +\d+\.\d\d +\d+\.\d\d +1\.00", output)
    assert re.search(r"decode +forward +blocked int8 x int8 +1 +\d+\.\d\d", output)


def test_says_what_is_left_out(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.AFFORDABLE, "cpu", 500.0)
    status, output, errors = dynamoe("bench", "--quick", "--rounds", "1")
    assert (status, errors) == (0, "")
    assert LEFT_OUT in output
    assert "megablox is left out: it is for tpu" in output and "mosaic_tpu is left out: it is for tpu" in output
    assert "times are multiples of one dense product by JAX" in output
    assert "xla and reference do E times the work here: they are left out above 5e+02 FLOPs of it" in output
    assert "decode" not in output.split("all correct")[1]


def test_a_wrong_result_has_status_1_and_is_not_timed(
    dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda x, w, sizes: 1.01 * jax.lax.ragged_dot(x, w, sizes))
    status, output, _ = dynamoe("bench", "--quick", "--output", str(tmp_path / "bench.jsonl"))
    assert status == 1
    assert "experts 20x6x4 3 skewed, dx: xla is WRONG by 1.0e-02, allowed is 1e-05" in output
    assert "a result is wrong: nothing is timed" in output and "time," not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "rounds is 0; it must be at least 1"),
        (("training_step", "--quick"), "quick is True; training_step has no shape to leave out"),
        (("training_step", "--output", "here"), "output is here; training_step writes none"),
        (("moe_layer", "--quick"), "quick is True; moe_layer has no shape to leave out"),
        (
            ("token_permute", "--model", "OLMoE"),
            "model is OLMoE; it is for grouped_matmul and moe_layer, and benchmark",
        ),
        (("moe_layer", "--model", "OLMo"), "invalid choice"),
        (("moe_layer", "--cases", "models"), "it is for grouped_matmul, and benchmark is moe_layer"),
        (("token_permute", "--cases", "layer"), "it is for grouped_matmul, and benchmark is token_permute"),
        (("--model", "OLMoE", "--cases", "layer"), "model is OLMoE; it is of the kind models, and cases are layer"),
        (("--compile-only",), "compile_only is True and chip None; each needs the other"),
        (("--compile-only", "--chip", "h200", "--tune"), "compile_only and tune are True; choose one"),
        (("moe_layer", "--tune"), "tune is True; it is for grouped_matmul, and benchmark is moe_layer"),
        (("--chip", "v5p"), "compile_only is False and chip v5p; each needs the other"),
        (("--compile-only", "--chip", "v5p", "--cases", "layer"), "it compiles the cases models alone"),
    ],
)
def test_arguments_that_do_not_fit_are_named(dynamoe: Dynamoe, arguments: tuple[str, ...], message: str) -> None:
    status, output, errors = dynamoe("bench", *arguments)
    assert (status, output) == (2, "")
    assert message in " ".join(errors.replace("│", "").split())


def test_an_output_that_exists_or_has_no_folder_is_refused(dynamoe: Dynamoe, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("kept")
    for name, reason in (("old.jsonl", "it exists; give a new file"), ("no/new.jsonl", "its folder does not exist")):
        status, output, errors = dynamoe("bench", "--output", str(tmp_path / name))
        assert (status, output) == (1, "") and f"{name}: {reason}" in errors
    assert (tmp_path / "old.jsonl").read_text() == "kept"


@pytest.mark.parametrize("refuses", [False, True])
def test_compiling_for_a_chip_reports_each_implementation_and_pass(
    dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    asked = []

    def compile_for(chip, function, x, w, sizes, dy):
        asked.append((chip, x, w))
        if len(asked) == 2:
            raise NotImplementedError("no such tile")
        if len(asked) == 3 and refuses:
            raise jax.errors.JaxRuntimeError("too much memory")
        report = dict.fromkeys(("argument_bytes", "output_bytes", "temporary_bytes", "alias_bytes"), 1024)
        return Report(chip=chip, devices=1, flops=8.0, kernels=(), collectives=(), compile_seconds=0.5, **report)

    monkeypatch.undo()
    monkeypatch.setattr(bench_compile, "mesh_for", lambda chip, axes: None)
    monkeypatch.setattr(bench_compile, "compile_for", compile_for)
    status, output, _ = dynamoe("bench", "--compile-only", "--chip", "v5p", "--model", "DeepSeek-V3")
    assert status == int(refuses)
    assert ("refused: too much memory" in output) == refuses
    assert "DeepSeek-V3 up training 65536x7168x2048 256, forward, xla bfloat16\n  chip: v5p, 1 device\n" in output
    assert "training 65536x7168x2048 256, forward, mosaic_tpu bfloat16\n  left out: no such tile\n" in output
    assert "DeepSeek-V3 up decode 512x7168x2048 256, forward, mosaic_tpu int8 x int8\n" in output
    assert len(asked) == 2 * 3 + 2 * 4 and asked[-1][1].codes.shape == (512, 7168)


def test_compiling_for_a_chip_without_its_compiler_or_for_none_that_is_known_says_so(dynamoe: Dynamoe) -> None:
    status, _, errors = dynamoe("bench", "--compile-only", "--chip", "v9")
    assert status == 1 and "chip is 'v9'; allowed are v5e" in errors


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
    checked = {tuple(line.split()[:2]) for line in checks.splitlines()}
    assert {("sort", name) for name in SORTS} | {("move", name) for name in PERMUTES} <= checked
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
    assert status == 1 and "xla is WRONG by inf" in output and "time," not in output


def test_tuning_needs_a_gpu(dynamoe: Dynamoe) -> None:
    status, output, errors = dynamoe("bench", "--tune")
    assert (status, output) == (1, "") and "tune is True; tables are of GPUs, and the platform is cpu" in errors


def test_what_was_tuned_is_told_and_kept_pass_by_pass(
    dynamoe: Dynamoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key.of("triton", Pass(rows=20, depth=6, columns=4, groups=3, bits=16, matrix_bits=16))
    tiles, file = GpuTiles(16, 32, 64), tmp_path / "card.json"

    def tune(cases: list[Case], rounds: int) -> Iterator[Tuned]:
        assert cases == TINY and rounds == 2
        yield Tuned("a case, forward, bfloat16: triton", key, tiles, 1.25, 7, ("(1, 2): too large",))
        assert json.loads(file.read_text())["rows"][0]["tiles"] == tiles._asdict()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_tune, "tune", tune)
    monkeypatch.setattr(bench_command, "check_gpu", lambda: None)
    status, output, _ = dynamoe("bench", "--tune", "--rounds", "2", "--output", str(file))
    assert status == 130
    assert "left out: (1, 2): too large" in output and "1.25 times as fast as the rule's, of 7" in output
