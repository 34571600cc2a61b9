"""`dynamoe bench generation` checks tokens, then times reading and drawing."""

import importlib.util
import re

import jax
import pytest
from rich.console import Console

from dynamoe.experiments.commands import bench_generation as bench
from dynamoe.experiments.commands.bench_generation import bench_generation, bytes_per_step
from dynamoe.experiments.commands.generation_models import Shape, decoder

TINY = Shape(
    vocab=32,
    width=8,
    layers=1,
    heads=2,
    kv_heads=1,
    head_width=4,
    experts=4,
    chosen=2,
    hidden=4,
    prompt=16,
    short=5,
    tokens=3,
    batches=(2,),
    long=256,
)


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither torch nor transformers is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_tokens_are_those_of_full_passes_and_both_passes_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_generation(1, Console(width=120), TINY) == 0
    output = capsys.readouterr().out
    assert "torch and transformers is not installed: no comparison with it" in output
    assert "greedy tokens of 2 rows are those of full forward passes" in output
    for name in ("read, dynamoe", "drawn, dynamoe"):
        assert re.search(rf"{name} +│? *2", output), output
    assert re.search(r"a cache of 256 slots takes -?\d+\.\d\d times", output)


def test_wrong_tokens_end_with_status_1_and_no_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_generate", lambda engine, prompts, tokens: [[0] * tokens] * len(prompts))
    assert bench_generation(1, Console(width=120), TINY) == 1
    output = capsys.readouterr().out
    assert "are not those of full forward passes" in output and "tokens/s" not in output


def test_a_step_reads_what_is_used_of_the_weights_and_the_cache(key: jax.Array) -> None:
    model = decoder(TINY).build(key, stacked=False)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 4  # query, key and value, output, norms of both
    others = attention + 2 * 8 + 8 + 8 * 4 + 8 * 32  # norms, router, head
    experts, cache = 4 * 3 * 8 * 4, 6.5 * 2 * 4
    assert bytes_per_step(TINY, model, 1) == 4 * (others + experts / 2 + cache)
    assert bytes_per_step(TINY, model, 2) == 4 * (others + experts * 0.75 + 2 * cache)
