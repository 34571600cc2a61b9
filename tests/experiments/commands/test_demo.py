"""The demo's parts at a tiny scale."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamoe.experiments.commands.demo import DENSE, MIXTURE, PROMPT, ngram_bits_per_byte
from dynamoe.experiments.data import held_out
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.ngram import NGram
from dynamoe.experiments.recipes import standard_library, standard_library_dense
from dynamoe.experiments.run_directory import read_metrics
from dynamoe.models import Decoder
from dynamoe.models.accounting import count_parts

Dynamoe = Callable[..., tuple[int, str, str]]


def numbers_of(output: str, name: str) -> list[str]:
    """The numbers in the row of the table that begins with `name`."""
    (row,) = [line for line in output.splitlines() if name in line and "│" in line]
    return re.findall(r"[\d,]+\.?\d*", row.split(name)[1])


def text_of(experiment: Experiment):
    sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
    return held_out(experiment.source, experiment.tokenizer, **sizes, max_bytes=experiment.evaluation_bytes)


def test_the_demo_shows_a_table_a_sample_and_a_report(
    dynamoe: Dynamoe,
    tiny: Callable[..., Experiment],
    dense_model: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standard_library, "recipe", tiny)
    monkeypatch.setattr(standard_library_dense, "recipe", lambda: tiny(model=dense_model))
    monkeypatch.chdir(tmp_path)
    status, output, errors = dynamoe("demo", "--smoke", "--seed", "3")
    assert (status, errors) == (0, "")
    demo = tmp_path / "runs" / "demo-smoke-seed3"
    last = {
        folder: [line["bits_per_byte"] for line in read_metrics(demo / folder) if line["split"] == "held_out"][-1]
        for folder in ("dense", "moe")
    }
    experiment = tiny(evaluation_bytes=20_000)
    ngram = ngram_bits_per_byte(experiment, text_of(experiment))
    assert numbers_of(output, "held-out bits per byte") == [
        f"{value:.4f}" for value in (last["dense"], last["moe"], ngram)
    ]
    totals = [count_parts(model, 16)[-1] for model in (dense_model, tiny().model)]
    assert numbers_of(output, "parameters, total") == [f"{total.parameters:,}" for total in totals]
    assert numbers_of(output, "FLOPs per token, forward") == [f"{total.flops:,.0f}" for total in totals]
    assert numbers_of(output, "step time, dense = 1")[0] == "1.00"
    assert "After 10 steps, 640 tokens for each model" in output
    assert PROMPT in output.split("a sample")[1]
    assert all(
        (demo / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "expert_load.png", "routers.png")
    )
    page = (demo / "report.html").read_text()
    assert f"{last['moe']:.3f} bits per byte" in page and page.count("data:image/png;base64,") == 3
    assert "The share of a token&#x27;s occurrences that go to the expert" in page
    assert '"seed": 3' in (demo / "moe" / "config.json").read_text()


def test_the_two_recipes_differ_in_their_networks_alone_and_cost_the_same() -> None:
    mixture, dense = standard_library.recipe(), standard_library_dense.recipe()
    assert dense == dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, ffn=dense.model.ffn))
    parts = {name: count_parts(of.model, of.sequence_length) for name, of in ((DENSE, dense), (MIXTURE, mixture))}
    flops = {name: {part.name: part.flops for part in of} for name, of in parts.items()}
    assert 1 <= flops[DENSE]["total"] / flops[MIXTURE]["total"] < 1.005
    assert mixture.model.ffn.experts >= 8
    assert flops[MIXTURE]["experts"] + flops[MIXTURE]["shared experts"] >= 0.5 * flops[MIXTURE]["total"]


def test_the_ngram_is_measured_on_the_text_that_the_models_are_measured_on(tiny: Callable[..., Experiment]) -> None:
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
    assert math.isclose(ngram_bits_per_byte(experiment, text_of(experiment)), expected)
    assert 0 < expected < 8
