"""`dynamoe compress` writes a run that `dynamoe evaluate` and `dynamoe generate` accept."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.training.quantized_run import COMPRESSION
from dynamoe.models.quantized_files import WEIGHTS

Dynamoe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def packed(dynamoe: Dynamoe, beside: Any, tmp_path: Path) -> tuple[Path, str]:
    """The packed run and what the command said."""
    status, output, errors = dynamoe(
        "compress", "--run-dir", beside.run, "--output", tmp_path / "packed", "--tokens", "2"
    )
    assert (status, errors) == (0, "")
    return tmp_path / "packed", output


def test_a_compressed_run_is_evaluated_generates_and_is_no_run_to_train(
    dynamoe: Dynamoe, beside: Any, packed: tuple[Path, str]
) -> None:
    run, output = packed
    assert re.search(
        r"layers\.1\.ffn\.experts\.down +int4, groups of 16 +4 x 16 x 16 +6\.00 +4,096 +768 +0\.\d+\n", output
    )
    assert re.search(r"head_kernel +- +16 x 258 +32\.00", output)
    record = json.loads((run / COMPRESSION).read_text())
    before, after = record["bits_per_byte"]
    assert f"bits per byte: {before:.4f} before, {after:.4f} after" in output and before != after
    for which, value in ((beside.run, before), (run, after)):
        status, figure, _ = dynamoe("evaluate", "--run-dir", which)
        assert status == 0 and figure.startswith(f"{value:.4f} bits per byte at step 3: ")
    status, text, errors = dynamoe("generate", "--run-dir", run, "--prompt", "line", "--tokens", "3")
    assert status == 0 and text.startswith("line") and "tokens drawn" in errors
    status, _, errors = dynamoe("train", "mine.py", "--steps", "3", "--run-dir", run)
    assert status == 1 and "holds packed weights, which cannot be trained" in errors
    (run / "quantized" / WEIGHTS).write_bytes(b"")
    status, _, errors = dynamoe("generate", "--run-dir", run)
    assert status == 1 and "weights.safetensors has 0 bytes" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "*.expert.*"), r"rule 0 has the pattern '\*\.expert\.\*': no path fits it"),
        (("--only", "*"), r"layers\.0\.attention_norm\.scale \[16\]: its module does not multiply with packed weights"),
        (("--group-size", "12"), r"layers\.0\.attention\.key \[16, 16\]: group_size is 12; it must divide D"),
        (("--leave", "*.bias"), r"leave names the pattern '\*\.bias', which no path fits"),
        (("--format", "mxfp4"), r"layers\.0\.attention\.key \[16, 16\]: group_size is 32; it must divide D"),
        (("--checkpoint", "7"), r"step is 7; .*checkpoints has \[3\]"),
        (("--output", "."), r"output \.: it is there already and not empty"),
        (("--tokens", "1"), r"tokens is 1; it must be at least 2"),
        (("--format", "nf4", "--zero-points"), r"zero_points is True; the codes of nf4 are not integers"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    dynamoe: Dynamoe, beside: Any, options: tuple[str, ...], message: str
) -> None:
    before = sorted(beside.run.parent.iterdir())
    status, _, errors = dynamoe("compress", *options)
    assert status in (1, 2) and re.search(message, errors), errors  # 2: the arguments alone are wrong
    assert sorted(beside.run.parent.iterdir()) == before


def test_without_arguments_the_newest_trained_run_gets_a_packed_one_beside_it(
    dynamoe: Dynamoe, beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(beside.run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    for name in ("mine-int4", "mine-int4-2"):
        status, output, _ = dynamoe("compress", "--tokens", "2")
        assert status == 0 and output.rstrip().endswith(f"runs/{name}")
        assert (tmp_path / "runs" / name / "config.json").is_file()
