"""A run of a mixture begins as the run of a dense model ended, and does so once."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.experiments.router_first import RouterFirst
from dynamoe.experiments.run_directory import RunDirectory, read_metrics
from dynamoe.experiments.training.restore import load_trained
from dynamoe.experiments.training.step import build_trainer
from dynamoe.experiments.training.train import Result, train
from dynamoe.experiments.training.upcycling import upcycled_weights
from dynamoe.models import Decoder, Dense, FirstLayers, Layout, MeshShape
from dynamoe.moe import Copy, DenseDispatcher, GranularSplit, MoE, SwiGLU, TopK, Upcycling

Tiny = Callable[..., Experiment]
HALVES = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher())
TWO_STAGES = RouterFirst(optimizer=AdamW(learning_rate=1e-2), steps=2)


@pytest.fixture(scope="module")
def dense(tiny: Tiny, dense_model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of 3 steps of a dense model."""
    experiment = tiny(model=dense_model, steps=3)
    return train(experiment, tmp_path_factory.mktemp("dense") / "run", console=Console(file=io.StringIO()))


@pytest.fixture
def mixture(tiny: Tiny, dense_model: Decoder) -> Callable[..., Experiment]:
    """`mixture(HALVES)`: the dense run's twin with another feed-forward network; measured and saved at every step."""
    every = {"evaluate_every": 1, "checkpoint_every": 1, "keep_last": 9, "optimizer": TWO_STAGES, "steps": 4}
    return lambda ffn, **options: tiny(model=dataclasses.replace(dense_model, ffn=ffn), **(every | options))


def held_out(run: Path) -> dict[int, float]:
    return {line["step"]: line["bits_per_byte"] for line in read_metrics(run) if line["split"] == "held_out"}


def flat(run: Path, step: int) -> dict[tuple[Any, ...], bytes]:
    params = nnx.to_flat_state(load_trained(run, step).params)
    return {path: np.asarray(variable.get_value()).tobytes() for path, variable in params}


def test_a_run_begins_with_the_dense_run_s_bits_per_byte_trains_in_two_stages_and_continues(
    dense: Result, mixture: Callable[..., Experiment], tmp_path: Path
) -> None:
    experiment = mixture(HALVES)
    output = io.StringIO()

    def run(path: Path) -> Result:
        return train(
            experiment,
            path,
            init_from=dense.path,
            upcycle=GranularSplit(shards=2),
            console=Console(file=output, soft_wrap=True),
        )

    whole = run(tmp_path / "run")
    # The learning rate of the first step is 0, so the model after it is the one before it.
    assert held_out(whole.path)[1] == pytest.approx(dense.bits_per_byte, rel=1e-5)
    assert f"upcycled layers 0, 1 of {dense.path}, step 3, by GranularSplit(shards=2" in output.getvalue()
    (entry,) = json.loads((whole.path / "environment.json").read_text())
    assert entry["init_from"] == str(dense.path) and entry["upcycle"]["keeps_function"] is True
    assert entry["upcycle"]["technique"]["shards"] == 2

    before, after, last = (flat(whole.path, step) for step in (1, 2, 4))
    for path in before:
        assert (before[path] == after[path]) == ("router" not in path), path
        assert before[path] != last[path], path

    stopped = shutil.copytree(whole.path, tmp_path / "stopped")
    for step in (2, 3, 4):  # as if it had been killed after the first step
        shutil.rmtree(stopped / "checkpoints" / str(step))
    again = run(stopped)
    assert output.getvalue().count("upcycled layers") == 1, "what is there is not made again"
    assert flat(stopped, 4) == last
    assert again.bits_per_byte == whole.bits_per_byte

    with pytest.raises(ValueError, match=r"it cannot be continued exactly \(upcycle was .*GranularSplit.* is now None"):
        train(experiment, stopped, init_from=dense.path, console=Console(file=output))


REFUSED: dict[str, tuple[Any, Upcycling, str]] = {
    "shards": (dataclasses.replace(HALVES, experts=5), GranularSplit(shards=2), "layer 0: .*shards is 2 and .*ts 5"),
    "width": (HALVES, Copy(), r"layer 0: MoE.expert is .*16.* the technique makes .* up \[4, 16, 32\]"),
    "router": (
        dataclasses.replace(HALVES, router=TopK(k=1, renormalize=False), expert=SwiGLU(hidden=32)),
        Copy(),
        "4 is right while all experts are equally probable",
    ),
    "nothing": (Dense(hidden=32), Copy(), "upcycling needs an MoE in one layer or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_before_anything_is_written(
    case: str, dense: Result, mixture: Callable[..., Experiment], tmp_path: Path, quiet: Console
) -> None:
    ffn, technique, message = REFUSED[case]
    experiment = mixture(ffn, optimizer=AdamW())
    with pytest.raises(ValueError, match=f"upcycle is .*, init_from .*: .*{message}"):
        train(experiment, tmp_path / "run", init_from=dense.path, upcycle=technique, console=quiet)
    with pytest.raises(ValueError, match="init_from None; it must be the directory of a dense model's run"):
        train(experiment, tmp_path / "run", upcycle=technique, console=quiet)
    assert not (tmp_path / "run").exists()


def check_on_a_mesh(dense: str) -> None:
    assert len(jax.devices()) == 8
    source = RunDirectory.load(Path(dense))
    model: Decoder = source.config.model
    ffn = FirstLayers(ffn=dataclasses.replace(HALVES, shared=SwiGLU(hidden=8)), first=Dense(hidden=32))
    experiment = dataclasses.replace(source.config, model=dataclasses.replace(model, ffn=ffn))
    layout = Layout(MeshShape(data=2, fsdp=2, expert=2).build())
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=experiment.steps)
    weights, _ = upcycled_weights(Path(dense), experiment, trainer, GranularSplit(shards=2))
    wanted = {"params": trainer.abstract_state.params, "variables": trainer.abstract_state.variables}
    assert jax.tree.structure(weights) == jax.tree.structure(wanted)
    for found, abstract in zip(jax.tree.leaves(weights), jax.tree.leaves(wanted), strict=True):
        assert found.sharding == abstract.sharding

    arrays = {path: v.get_value() for path, v in nnx.to_flat_state(weights["params"])}
    before = {path: v.get_value() for path, v in nnx.to_flat_state(load_trained(Path(dense)).params)}
    stacked = ("segments", 0, "unit", "layers", 0, "ffn", "up")
    np.testing.assert_array_equal(arrays[stacked], before[stacked][0])  # the first layer stays dense
    up = arrays[("segments", 1, "unit", "layers", 0, "ffn", "experts", "up")]
    assert up.addressable_shards[0].data.shape == (2, 8, 16)  # 4 experts over 2, width 16 over 2
    halves = np.split(np.asarray(before[stacked][1]), 2, axis=1)
    np.testing.assert_array_equal(up, [*halves, *halves])


def test_a_mixture_is_born_split_over_the_mesh(run_with_devices: Callable[..., str], dense: Result) -> None:
    run_with_devices(8, check_on_a_mesh, str(dense.path))
