"""The commands on a published model: `--model`."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamoe.experiments.data import HuggingFaceTokenizer
from dynamoe.models.checkpoints import from_pretrained

Dynamoe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    rng = np.random.default_rng(0)
    file.write_text(" ".join(f"w{i}" for i in rng.integers(4, 32, 50)))
    return file


def test_perplexity_is_that_of_full_forward_passes(dynamoe: Dynamoe, published: Path, words: Path) -> None:
    status, output, errors = dynamoe("evaluate", "--model", published, "--data", words, "--sequence-length", "17")
    assert (status, errors) == (0, "")
    ids = HuggingFaceTokenizer(path=str(published / "tokenizer.json")).encode(words.read_text())
    rows = np.concatenate([[1], ids])[:51].reshape(3, 17)
    logits = from_pretrained(published).model(jnp.asarray(rows)).logits
    nats = float(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:]).mean())
    assert output.startswith(f"perplexity {math.exp(nats):.4f} ({nats:.4f} nats a token) of {published}: 48 targets, ")
    assert "tokenizer HuggingFaceTokenizer(path=" in output
    assert output.endswith(
        "windows of 17 tokens that do not overlap, the first of each no target, the last 0 tokens left out\n"
    )


def test_documents_apart_are_told_in_bits_per_byte(dynamoe: Dynamoe, published: Path, words: Path) -> None:
    words.write_text("w4 w5 w6;w7 w8")
    status, output, _ = dynamoe("evaluate", "--model", published, "--text", words, "--separator", ";")
    assert status == 0
    assert re.match(rf"\d+\.\d{{4}} bits per byte of {published}: 13 bytes in 2 documents, 7 targets, ", output)


def test_continues_a_prompt_up_to_the_models_own_end(dynamoe: Dynamoe, published: Path) -> None:
    options = ("--prompt", "w4 w5", "--temperature", "0", "--tokens", "4")
    status, output, errors = dynamoe("generate", "--model", published, *options)
    assert status == 0 and "3 tokens read" in errors and "3 tokens drawn" in errors
    words = output.split()
    assert words[:2] == ["w4", "w5"] and len(words) == 6
    first = int(words[2][1:])
    (published / "generation_config.json").write_text(f'{{"eos_token_id": [{first}]}}')
    status, output, _ = dynamoe("generate", "--model", published, *options)
    assert (status, output.split()) == (0, ["w4", "w5"])


def test_shows_what_its_routers_do_and_leaves_a_report_where_asked(
    dynamoe: Dynamoe, published: Path, words: Path, tmp_path: Path
) -> None:
    options = ("inspect", "--model", published, "--text", words, "--compare", words)
    status, output, errors = dynamoe(*options, "--output", tmp_path / "seen")
    assert (status, errors) == (0, "")
    assert f"bytes of {words}, {published}" in output
    assert "load" in output and output.endswith("report.html\n")
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "Experts that work together" in page and "Texts compared" in page
    assert (tmp_path / "seen" / "expert_load.png").is_file()


def test_a_packed_copy_is_evaluated_and_generates(
    dynamoe: Dynamoe, published: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, errors = dynamoe(
        "compress", "--model", published, "--format", "int8", "--group-size", "4", "--data", words, "--tokens", "2"
    )
    assert (status, errors) == (0, "")
    packed = tmp_path / "published-int8"
    assert re.search(r"layers\.1\.ffn\.experts\.down +int8, groups of 4 ", output)
    assert output.endswith(f"written to {packed.name}\n")
    assert (packed / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    found = []
    for model in (published, packed):
        status, figure, errors = dynamoe("evaluate", "--model", model, "--data", words)
        assert (status, errors) == (0, "")
        found.append(float(figure.split()[1]))
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.05)
    status, text, errors = dynamoe("generate", "--model", packed, "--prompt", "w4", "--tokens", "2")
    assert status == 0 and text.startswith("w4") and "drawn" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("generate", "--model", "nowhere"), "path is nowhere; there is no such folder"),
        (("evaluate", "--model", "m", "--run-dir", "r"), "run_dir is r and model m; give a run or a published model"),
        (("evaluate", "--model", "m", "--checkpoint", "3"), "checkpoint is 3 and model m; give a run or a published"),
        (("evaluate", "--tokenizer", "t.json"), "tokenizer is t.json; a run has its own"),
        (("evaluate", "--separator", ";"), "separator is ';' and text empty; it splits the files of --text"),
        (("inspect", "--output", "x"), "output is x; a run's report lies in the run"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, errors = dynamoe(*options)
    assert status == 1
    assert re.match(f"dynamoe: error: {message}", errors) and len(errors.splitlines()) == 2
