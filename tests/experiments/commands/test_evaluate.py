"""`dynamoe evaluate` measures what the training run measured."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynamoe.experiments.commands import trained_run
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.recipes import standard_library
from dynamoe.experiments.run_directory import RunDirectory, read_metrics

Dynamoe = Callable[..., tuple[int, str, str]]


def logged(run: Path) -> float:
    return [line["bits_per_byte"] for line in read_metrics(run) if line["split"] == "held_out"][-1]


def test_without_arguments_the_newest_runs_figure_is_the_logged_one(dynamoe: Dynamoe, beside: Any) -> None:
    status, output, errors = dynamoe("evaluate")
    assert (status, errors) == (0, "")
    announced, figure = output.splitlines()
    assert announced.endswith("runs/mine")
    assert figure.startswith(f"{logged(beside.run):.4f} bits per byte at step 3: ")
    assert "tokenizer Bytes(), windows of 16 tokens that do not overlap" in figure


def test_the_same_text_from_files_has_the_same_figure(dynamoe: Dynamoe, beside: Any, tmp_path: Path) -> None:
    documents = RunDirectory.load(beside.run).config.source.documents("validation")
    for number, document in enumerate(documents):
        (tmp_path / f"{number:03}.txt").write_text(document)
    status, output, _ = dynamoe("evaluate", "--run-dir", beside.run, "--text", tmp_path / "*.txt")
    assert status == 0
    size = sum(len(document.encode()) for document in documents)
    expected = f"{logged(beside.run):.4f} bits per byte at step 3: {size:,} bytes in {len(documents)} documents, "
    assert output.startswith(expected)


def test_reads_whole_documents_up_to_a_number_of_bytes(dynamoe: Dynamoe, beside: Any) -> None:
    documents = RunDirectory.load(beside.run).config.source.documents("validation")
    size = len(documents[0].encode()) + len(documents[1].encode())
    status, output, _ = dynamoe("evaluate", "--run-dir", beside.run, "--max-bytes", str(size))
    assert status == 0
    assert f"{size:,} bytes in 2 documents" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--run-dir", "nowhere"), "run directory .*nowhere: no such directory"),
        (("--run-dir", "."), "run directory .*: it is no run, there is no config.json in it"),
        (("--checkpoint", "7"), r"step is 7; .*checkpoints has \[3\]"),
        (("--sequence-length", "0"), "sequence_length=0: allowed are 1 and above"),
        (("--max-bytes", "0"), "max_bytes=0: allowed are 1 and above"),
        (("--text", "nowhere/*.txt"), "matches no file; allowed are paths and globs of existing files"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, beside: Any, options: tuple[str, ...], message: str
) -> None:
    status, _, errors = dynamoe("evaluate", *options)
    assert status == 1
    assert re.match(f"dynamoe: error: .*{message}", errors) and len(errors.splitlines()) == 2


def test_without_any_run_the_default_recipe_is_trained_first(
    dynamoe: Dynamoe, tiny: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard_library, "recipe", tiny)
    monkeypatch.chdir(tmp_path)
    status, output, _ = dynamoe("evaluate")
    assert status == 0
    assert output.startswith("there is no run in runs/ yet: training the default recipe first")
    run = tmp_path / "runs" / "standard_library"
    assert output.splitlines()[-1].startswith(f"{logged(run):.4f} bits per byte at step 6: ")
    assert trained_run.find_run(None, Console(quiet=True)).absolute() == run
