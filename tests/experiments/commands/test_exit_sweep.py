"""Sweeps of early exit's thresholds, against what can be counted by hand, and as commands."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dynamoe.dynamic import EarlyExit, Exits, NeverExit
from dynamoe.experiments.commands import sweep_thresholds
from dynamoe.experiments.data import held_out
from dynamoe.experiments.exit_sweep import exit_bits, exit_flops, sweep
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.training.train import train
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.models.accounting import count_parts

Dynamoe = Callable[..., tuple[int, str, str]]
MODEL = Decoder(
    vocab=258, width=16, layers=3, attention=Attention(heads=2), ffn=Dense(hidden=16), exits=Exits(after=(1, 2))
)


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Experiment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with exits."""
    return train(tiny(model=MODEL, steps=3), tmp_path_factory.mktemp("exits") / "run").path


def test_flops_of_exits_are_those_of_shallower_models_and_the_heads_on_the_way() -> None:
    model = MODEL.build(jax.random.key(0), stacked=False)
    head = 2 * 16 * 258
    for exit, depth in enumerate((1, 2, 3)):
        shallow = count_parts(dataclasses.replace(MODEL, layers=depth, exits=None), 32)[-1].flops
        assert exit_flops(model, 32)[exit] == pytest.approx(shallow + exit * head)


def test_bits_at_the_ends_are_those_of_one_exit(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(model=MODEL)
    text = held_out(experiment.source, experiment.tokenizer, batch_size=4, sequence_length=16, max_bytes=300)
    model = MODEL.build(jax.random.key(0), stacked=False)
    never, always, middle = exit_bits(model, EarlyExit(thresholds=NeverExit()), text, [None, 0.0, 0.05])
    expected = []
    for exit in (2, 0):
        nats = 0.0
        for batch in text.batches:
            hidden = model.hidden(*map(jax.numpy.asarray, batch.inputs))
            logits = np.asarray(model.head((*hidden.exits, hidden.x)[exit], exit), np.float64)
            chances = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            mask = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, :-1] > 0)
            nats -= np.take_along_axis(chances, batch.tokens[:, 1:, None], axis=2)[..., 0][mask].sum()
        expected.append(nats / np.log(2) / text.bytes)
    assert [never, always] == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(middle)


def test_a_sweep_goes_from_the_full_model_to_the_first_exit(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(model=MODEL)
    text = held_out(experiment.source, experiment.tokenizer, batch_size=4, sequence_length=16, max_bytes=300)
    model = MODEL.build(jax.random.key(0), stacked=False)
    found = sweep(
        model, EarlyExit(thresholds=NeverExit()), [[1, 2]] * 4, np.arange(4.0), text, thresholds=[1.0, 0.0], tokens=3
    )
    full, last, first = found.points
    assert (full.layers, last.layers, first.layers) == (3, 3, 1)
    assert full.disagreement == last.disagreement == 0 and last.flops > full.flops > first.flops
    assert found.losses.shape == (4, 2) and len(full.by_difficulty) == 4 and first.seconds > 0


def test_a_run_is_swept_calibrated_and_generates_by_its_guarantee(
    dynamoe: Dynamoe, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_thresholds, "THRESHOLDS", (1.0, 0.0))
    options = ("--sweeping.prompts", "6", "--sweeping.prompt-tokens", "4", "--sweeping.answer-tokens", "3")
    levels = ("--sweeping.delta", "0.4", "--sweeping.epsilon", "0.3")
    beside = ("--sweeping.beside", run)
    status, output, errors = dynamoe("evaluate", "--run-dir", run, "--sweep", "thresholds", *options, *levels, *beside)
    assert (status, errors) == (0, ""), errors
    full, other = (re.search(rf"{name} +│ +3\.00 +│.*", output) for name in ("full model", "run"))
    assert full is not None and other is not None
    assert full[0].split("│")[4:6] == other[0].split("│")[4:6]  # itself: no token differs, the same bits per byte
    assert re.search(r"full model +│ +3\.00 +│ +1\.00", output) and "With probability at least 0.7 over" in output
    guarantee = json.loads((run / "early_exit.json").read_text())
    assert guarantee["n"] == 6 and guarantee["policy"]["exits"] == [1, 2, 3] and (run / "early_exit.png").is_file()
    calibrated = (
        "generate",
        "--run-dir",
        run,
        "--tokens",
        "3",
        "--early-exit",
        "calibrated",
        "--skipped-layers",
        "defer",
    )
    status, _, errors = dynamoe(*calibrated, "--temperature", "0")
    assert status == 0 and re.search(r"; \d\.\d\d layers a token", errors)
    status, _, errors = dynamoe(*calibrated)  # at temperature 0.8
    assert status == 1 and "policy.batch is " in errors and "but the guarantee was calibrated with" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("generate", "--early-exit", "x"), "early_exit is 'x'; it must be a threshold from 0 to 1, or 'calibrated'"),
        (("generate", "--early-exit", "1.5"), "early_exit is '1.5'; it must be a threshold from 0 to 1"),
        (
            ("evaluate", "--sweep", "thresholds", "--sweeping.prompts", "9"),
            "prompts is 9; delta = 0.05 with epsilon = 0.05 needs",
        ),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, run: Path, options: tuple[str, ...], message: str
) -> None:
    status, _, errors = dynamoe(*options, "--run-dir", run)
    assert status == 1 and re.match(f"dynamoe: error: {message}", errors)


def test_a_run_without_exits_is_refused(dynamoe: Dynamoe, beside: Any) -> None:
    for options in (("generate", "--early-exit", "0.5"), ("evaluate", "--sweep", "thresholds")):
        status, _, errors = dynamoe(*options, "--run-dir", beside.run)
        assert status == 1 and "Decoder.exits" in errors and "is None" in errors
