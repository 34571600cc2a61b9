"""Assignments that a device has no room for do not get lost silently: a run says so, or fails, as it was told."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dynamoe.experiments.data import TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.training.loop import NonFinite
from dynamoe.experiments.training.train import train
from dynamoe.models import Attention, Decoder, MeshShape
from dynamoe.moe import ExpertParallel, MoE, RaggedAllToAll, SwiGLU, TopK


def check_overflow(text: str, folder: str) -> None:
    exchange = RaggedAllToAll(room=0.25)
    mixture = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8), dispatcher=ExpertParallel(exchange=exchange))
    experiment = Experiment(
        model=Decoder(vocab=264, width=8, layers=1, attention=Attention(heads=1), ffn=mixture),
        source=TextFiles(train=(text,), separator="\n\n"),
        mesh=MeshShape(data=1, expert=4),
        steps=2,
        batch_size=4,
        sequence_length=16,
        log_every=1,
    )
    printed = io.StringIO()
    train(experiment, Path(folder) / "told", console=Console(file=printed, width=500))
    assert "step 2: RaggedAllToAll.room is too small for what came to some device; share of" in printed.getvalue()
    assert "assignments lost: layers.0 " in printed.getvalue()

    strict = ExpertParallel(exchange=dataclasses.replace(exchange, fail=True))
    model = dataclasses.replace(experiment.model, ffn=dataclasses.replace(mixture, dispatcher=strict))
    with pytest.raises(NonFinite, match=r"step 1: loss nan.*RaggedAllToAll.room is too small .* lost: layers.0 \d+.*%"):
        train(dataclasses.replace(experiment, model=model), Path(folder) / "fails", console=Console(file=printed))


def test_a_run_says_what_devices_had_no_room_for_or_fails(
    run_with_devices: Callable[..., str], text: Path, tmp_path: Path
) -> None:
    run_with_devices(4, check_overflow, str(text), str(tmp_path))
