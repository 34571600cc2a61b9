"""`dynamoe bench moe_layer` beside torch's products and transformers' block; they need torch and transformers."""

import re

import pytest
from rich.console import Console

from dynamoe.experiments.commands import bench_layer as bench
from dynamoe.experiments.commands.bench_layer import bench_layer
from dynamoe.experiments.commands.bench_layer_ours import LAYER, MOVES
from dynamoe.experiments.commands.bench_layer_problem import Shape
from dynamoe.experiments.commands.bench_layer_torch import BLOCK, PRODUCTS
from dynamoe.moe import DroplessDispatcher

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

TINY = Shape(tokens=16, width=16, hidden=8, experts=4, chosen=2)
"""Rows of 16 bytes and more, also in bfloat16: torch asks for that."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_equals_transformers_block_and_is_timed_beside_it(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = TINY._replace(dtype=dtype, model="Mixtral-8x7B / 8")
    assert bench_layer([shape], 1, None, Console(width=160)) == 0
    output, block = capsys.readouterr().out, BLOCK
    assert "transformers' block is OLMoE's, at this size" in output
    error = re.search(rf"{LAYER}: largest error against {block}: (\S+), allowed", output)
    assert error is not None and 0 < float(error[1]) < shape.allowed_error
    assert f"{block}: largest error against every expert on every token" in output
    for name, ratio, memory in (
        (PRODUCTS, r"1\.00", "–"),
        (block, r"\d+\.\d\d", "–"),
        (MOVES, r"\d+\.\d\d", r"\d+\.\d"),
    ):
        assert re.search(rf"│ {re.escape(name)} +│ +\d+ │ +\d+ │ +{ratio} │ +{memory} │", output), name
    assert "torch's are not counted on CPU" in " ".join(output.split())


def test_a_layer_that_is_wrong_at_the_tokens_that_the_oracle_leaves_out_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = DroplessDispatcher.combine
    monkeypatch.setattr(DroplessDispatcher, "combine", lambda *arguments: right(*arguments).at[1].multiply(1.01))
    monkeypatch.setattr(bench, "ORACLE_TOKENS", 8)  # of 16: every other one
    monkeypatch.setattr(bench, "in_turns", None)
    assert bench_layer([TINY], 1, None, Console(width=160)) == 1
    oracle, peer = (
        re.search(rf"{LAYER}: largest error against {name}\D.*: (\S+), allowed", output)
        for output in [capsys.readouterr().out]
        for name in ("every expert", "transformers")
    )
    assert oracle is not None and peer is not None and float(oracle[1]) < 1e-5 < 1e-4 < float(peer[1])
