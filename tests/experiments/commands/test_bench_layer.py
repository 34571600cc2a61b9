"""`dynamoe bench moe_layer` checks a layer, then times it beside its variants, its parts and its peers."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dynamoe.experiments.commands import bench_layer as bench
from dynamoe.experiments.commands import bench_layer_ours as ours
from dynamoe.experiments.commands import bench_layer_problem as problem
from dynamoe.experiments.commands.bench_layer import bench_layer
from dynamoe.experiments.commands.bench_layer_ours import FUSED, LAYER, MOVES, OWN, RAGGED_DOT
from dynamoe.experiments.commands.bench_layer_problem import OLMOE_LIKE, Shape, shapes
from dynamoe.experiments.commands.bench_layer_torch import PRODUCTS
from dynamoe.kernels.grouped_matmul import api

Dynamoe = Callable[..., tuple[int, str, str]]

TINY = Shape(tokens=16, width=8, hidden=4, experts=4, chosen=2)
OURS = [LAYER, FUSED, RAGGED_DOT, MOVES, OWN]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither torch nor transformers is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths and tokens that on CPU become those of TINY."""
    tiny = problem.MODELS["OLMoE"]._replace(width=64, hidden=32, experts=4, per_token=2)
    monkeypatch.setattr(problem, "MODELS", {**problem.MODELS, "OLMoE": tiny})
    monkeypatch.setattr(problem, "PHASES", {"training": 128})


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the benchmark asks; JAX goes on computing where it did."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_a_layer_is_compared_with_every_expert_on_every_token_and_timed_beside_its_parts(
    no_peers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_layer([TINY], 1, None, Console(width=140)) == 0
    output = capsys.readouterr().out
    assert f"{PRODUCTS} is left out: torch is not installed" in output
    for name in OURS[:3]:
        error = re.search(
            rf"{name}: largest error against every expert on every token: (\S+), allowed is 1e-04", output
        )
        assert error is not None and 0 < float(error[1]) < 1e-5
    for name in OURS:
        ratio = r"1\.00" if name == OWN else r"\d+\.\d\d"
        assert re.search(rf"│ {re.escape(name)} +│ +\d+ │ +\d+ │ +{ratio} │ +\d+\.\d │", output), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_variant_that_is_wrong_is_named_and_nothing_is_timed(
    no_peers: None, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = api.IMPLEMENTATIONS["xla"]
    monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda *operands: 1.05 * right(*operands))
    monkeypatch.setattr(bench, "in_turns", None)
    assert bench_layer([TINY._replace(dtype=dtype)], 1, None, Console(width=140)) == 1
    output = capsys.readouterr().out
    errors = dict(re.findall(r"(the layer.*): largest error .*: (\S+), allowed", output))
    allowed = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    assert float(errors[LAYER]) < allowed < 0.05 < float(errors[RAGGED_DOT])
    assert "a result is wrong: nothing is timed" in output


def test_a_wrong_gradient_of_a_weight_alone_is_seen(no_peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    @jax.custom_vjp
    def kept(w: jax.Array) -> jax.Array:
        return w

    kept.defvjp(lambda w: (w, None), lambda _, dw: (1.01 * dw,))
    right = api.IMPLEMENTATIONS["xla"]
    monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda x, w, sizes: right(x, kept(w), sizes))
    monkeypatch.setattr(bench, "in_turns", None)
    assert bench_layer([TINY], 1, None, Console(quiet=True)) == 1


def test_what_refuses_or_lacks_memory_is_left_out_and_what_is_broken_is_not(
    no_peers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", fail)

    for error in (NotImplementedError("no such tile"), RuntimeError("RESOURCE_EXHAUSTED: 1 TB\nand more")):
        fails(error)
        assert bench_layer([TINY], 1, None, Console(width=140)) == 0
    output = capsys.readouterr().out
    assert f"{RAGGED_DOT} is left out: no such tile\n" in output
    assert f"{RAGGED_DOT} is left out: RESOURCE_EXHAUSTED: 1 TB\n" in output
    assert output.count(f"│ {OWN}") == 2 and f"│ {RAGGED_DOT}" not in output
    fails(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        bench_layer([TINY], 1, None, Console(quiet=True))


def test_nothing_is_timed_that_could_not_be_compared(
    no_peers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: too many experts")

    monkeypatch.setattr(bench, "every_expert_on_every_token", fail)
    monkeypatch.setattr(bench, "in_turns", None)
    assert bench_layer([TINY], 1, None, Console(width=140)) == 1
    output = capsys.readouterr().out
    assert "every expert on every token is left out: RESOURCE_EXHAUSTED: too many experts" in output
    assert "there is nothing to compare: nothing is timed" in output


def test_a_models_layer_writes_a_line_for_each_contender(
    no_peers: None, small_models: None, dynamoe: Dynamoe, tmp_path: Path
) -> None:
    file = tmp_path / "layers.jsonl"
    status, output, errors = dynamoe("bench", "moe_layer", "--model", "OLMoE", "--rounds", "2", "--output", file)
    assert (status, errors) == (0, "")
    assert "OLMoE / 8: 16 tokens of width 8, 4 experts of hidden width 4, 2 per token, float32" in output
    assert "on CPU tokens and widths are divided by 8" in output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["contender"] for line in lines] == OURS
    for line in lines:
        assert line["model"] == "OLMoE / 8" and line["shape"] == {
            key: n for key, n in TINY._asdict().items() if key != "model"
        }
        assert line["seconds"]["median"] >= line["seconds"]["fastest"] > 0 and line["rounds"] == 2
        assert line["ratio"][OWN]["median"] > 0
        assert (line["platform"], line["device"]) == ("cpu", jax.devices()[0].device_kind)
        assert {"python", "jax", "jaxlib"} <= set(line["versions"]) and line["date"].startswith("20")
    memory = {line["contender"]: line["temporary_bytes"] for line in lines}
    assert all(memory[name] > 0 for name in (LAYER, FUSED, RAGGED_DOT, MOVES))
    assert memory[LAYER] < memory[RAGGED_DOT]


def test_an_output_that_exists_is_refused_before_anything_runs(dynamoe: Dynamoe, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("kept")
    status, output, errors = dynamoe("bench", "moe_layer", "--output", tmp_path / "old.jsonl")
    assert (status, output) == (1, "") and "old.jsonl: it exists; give a new file" in errors


def test_on_cpu_a_models_tokens_and_widths_are_divided_and_its_experts_are_not() -> None:
    assert shapes(None) == (OLMOE_LIKE,)
    assert shapes("DeepSeek-V3") == (Shape(1024, 896, 256, 256, 8, "float32", "DeepSeek-V3 / 8"),)


def test_on_a_gpu_every_model_of_three_is_measured_at_full_size(on_a_gpu: None) -> None:
    assert shapes("Mixtral-8x7B") == (Shape(8192, 4096, 14336, 8, 2, "bfloat16", "Mixtral-8x7B"),)
    assert [shape.model for shape in shapes(None)] == ["OLMoE", "Mixtral-8x7B", "DeepSeek-V3"]


def test_on_a_gpu_each_implementation_for_it_is_a_contender_and_ragged_dot_where_it_is_affordable(
    on_a_gpu: None,
) -> None:
    small, _, large = shapes(None)
    found = ours.variants(small)
    assert {"the layer by triton", f"{FUSED} by triton", RAGGED_DOT} <= set(found) and not list(ours.notes(small))
    assert found["the layer by triton"].expert.implementation == "triton"
    assert found[f"{FUSED} by triton"].dispatcher.implementation == "triton"
    assert RAGGED_DOT not in ours.variants(large)
    (note,) = ours.notes(large)
    assert note.startswith(f"{RAGGED_DOT} is left out: it does E times the work here, 4e+15 FLOPs; above 9e+14")


def test_a_peer_without_its_gpu_is_left_out_with_the_reason(
    no_peers: None, on_a_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = bench._contenders(problem.draw(TINY), Console(width=140))
    assert "the layer by triton is left out: " in capsys.readouterr().out and LAYER in contenders


def test_every_token_has_a_clear_choice_whatever_the_dtype() -> None:
    for dtype in ("float32", "bfloat16"):
        shape = Shape(64, 16, 4, 32, 8, dtype)
        drawn = problem.draw(shape)
        assert {drawn.x.dtype, drawn.dy.dtype, *(weight.dtype for weight in drawn.weights)} == {jnp.dtype(dtype)}
        logits = np.asarray(drawn.x[0], np.float64) @ np.asarray(drawn.weights.router, np.float64)
        best = np.sort(logits, axis=1)[:, ::-1]
        assert (best[:, 7] - best[:, 8] > 0.99 * problem.CLEAR).all()
        assert len(np.unique(np.asarray(drawn.x[0], np.float32), axis=0)) == 64


def test_the_flops_of_a_layer_are_those_of_nine_products() -> None:
    products = 3 * 3  # gate, up and down, each forward and with two gradients
    assert TINY.flops == products * 2 * (16 * 2) * 8 * 4
    assert ours.ragged_dot_work(TINY) == 4 * TINY.flops
