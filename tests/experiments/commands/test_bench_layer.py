"""`dynamoe bench moe_layer` checks a layer, then times it beside its parts and its peers."""

import importlib.util
import re

import pytest
from rich.console import Console

from dynamoe.experiments.commands import bench_layer as bench
from dynamoe.experiments.commands.bench_layer import LAYER, MOVES, OWN, Shape, bench_layer
from dynamoe.moe import DroplessDispatcher

TINY = Shape(tokens=16, width=8, hidden=4, experts=4, chosen=2)


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither torch nor transformers is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_layer_is_compared_with_every_expert_on_every_token_and_timed_beside_its_parts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench_layer(1, Console(width=120), TINY) == 0
    output = capsys.readouterr().out
    assert "torch and transformers is not installed: no comparison with it" in output
    error = re.search(r"against every expert on every token: (\S+), allowed is 1e-04", output)
    assert error is not None and 0 < float(error[1]) < 1e-5
    for name, ratio in ((LAYER, r"\d+\.\d\d"), (MOVES, r"\d+\.\d\d"), (OWN, r"1\.00")):
        assert re.search(rf"{re.escape(name)} +│ +\d+ │ +{ratio} ", output), name


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = DroplessDispatcher.combine
    monkeypatch.setattr(DroplessDispatcher, "combine", lambda *arguments: 1.01 * right(*arguments))
    monkeypatch.setattr(bench, "in_turns", None)
    assert bench_layer(1, Console(width=120), TINY) == 1
    assert "a result is wrong: nothing is timed" in capsys.readouterr().out
