"""The demo's parts at a tiny scale."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from dynamoe.experiments.commands.demo import PROMPT, ngram_bits_per_byte
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.ngram import NGram
from dynamoe.experiments.recipes import standard_library
from dynamoe.experiments.run_directory import read_metrics
from dynamoe.models.accounting import count_parts

Dynamoe = Callable[..., tuple[int, str, str]]


def test_the_demo_shows_a_table_a_sample_and_a_picture(
    dynamoe: Dynamoe, tiny: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard_library, "recipe", tiny)
    monkeypatch.chdir(tmp_path)
    status, output, errors = dynamoe("demo", "--smoke")
    assert (status, errors) == (0, "")
    run = tmp_path / "runs" / "demo-smoke"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = [line["bits_per_byte"] for line in read_metrics(run) if line["split"] == "held_out"]
    (row,) = [line for line in output.splitlines() if "held-out bits per byte" in line]
    baseline = ngram_bits_per_byte(tiny(evaluation_bytes=20_000))
    assert re.findall(r"\d+\.\d+", row) == [f"{held_out[-1]:.4f}", f"{baseline:.4f}"]
    total = count_parts(tiny().model, 16)[-1]
    assert f"{total.parameters:,}" in output and f"{total.flops:,.0f}" in output
    assert "after 10 steps, 640 tokens" in output
    assert PROMPT in output.split("a sample")[1]


def test_the_ngram_is_measured_on_the_text_that_the_model_is_measured_on(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(evaluation_bytes=100)
    documents, size = [], 0
    for document in experiment.source.documents("validation"):
        if size + len(document.encode()) > 100:
            break
        documents.append(document)
        size += len(document.encode())
    assert 0 < size <= 100 and len(documents) < len(experiment.source.documents("validation"))
    encode = experiment.tokenizer.encode_documents
    model = NGram.fit(encode(experiment.source.documents("train")), vocab_size=258, order=3)
    expected = model.bits_per_byte(encode(documents), size)
    assert math.isclose(ngram_bits_per_byte(experiment), expected)
    assert 0 < expected < 8
    assert jax.default_backend() == "cpu"
