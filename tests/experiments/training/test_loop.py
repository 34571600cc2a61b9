"""A run is written whole, continues to the same bits, and refuses before it writes."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from dynamoe.experiments.data import TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Optimizer
from dynamoe.experiments.run_directory import read_metrics
from dynamoe.experiments.training.checkpoints import Checkpoints, DamagedCheckpoint
from dynamoe.experiments.training.loop import NonFinite
from dynamoe.experiments.training.restore import METRIC, load_trained
from dynamoe.experiments.training.train import Result, train
from dynamoe.models import Decoder

Contents = Callable[[Path], dict[str, bytes]]
Tiny = Callable[..., Experiment]


class Interrupter(io.StringIO):
    """What a console writes to; sends this process a signal when a text comes by."""

    def __init__(self, text: str, number: signal.Signals):
        super().__init__()
        self._text, self._number = text, number

    def write(self, text: str) -> int:
        if self._text in text:
            os.kill(os.getpid(), self._number)
        return super().write(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explode(Optimizer):
    """An optimizer of the user's own: the first step is enormous, the second has no finite loss."""

    def update_rule(self, params: nnx.State, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.scale(1e38)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of 6 steps, from beginning to end."""
    return train(tiny(), tmp_path_factory.mktemp("finished") / "run", console=Console(file=io.StringIO()))


@pytest.fixture
def copy(finished: Result, tmp_path: Path) -> Path:
    """The finished run, for a test to change."""
    return shutil.copytree(finished.path, tmp_path / "copy")


def measurements(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run)
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def manifest(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / str(step) / "manifest" / "metadata").read_text())


def test_a_run_is_written_whole(finished: Result, tiny: Tiny) -> None:
    path, lines = finished.path, read_metrics(finished.path)
    assert (finished.step, finished.interrupted, finished.exit_status) == (6, None, 0)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    held_out = {line["step"]: line["bits_per_byte"] for line in lines if line["split"] == "held_out"}
    assert list(held_out) == [3, 6]
    assert held_out[6] == finished.bits_per_byte < held_out[3]
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert manifest(path, 6)["metrics"] == {METRIC: finished.bits_per_byte}
    assert list((path / "tensorboard").glob("events*"))
    (entry,) = json.loads((path / "environment.json").read_text())
    assert entry["source"] == json.loads(json.dumps(tiny().source.describe()))


def test_training_metrics_agree_with_their_definitions(finished: Result, tiny: Tiny) -> None:
    optimizer = tiny().optimizer
    rate = optimizer.schedule.build(peak=optimizer.learning_rate, steps=6)
    for line in measurements(finished.path):
        if line["split"] == "train":
            assert line["learning_rate"] == pytest.approx(float(rate(line["step"] - 1)))
            assert line["auxiliary_loss"] == pytest.approx(2 * 0.01 * line["BalanceLoss"], rel=1e-5)  # two layers
            assert 0 < line["router_entropy"] < math.log(4) + 1e-6
            assert line["gradient_norm"] > 0
    first = measurements(finished.path)[0]
    assert first["loss"] == pytest.approx(math.log(258), abs=1.0)  # a fresh model has no opinion


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 0, 3), (signal.SIGINT, 130, 2)],  # between two checkpoints, and while step 2 is being saved
)
def test_an_interrupted_run_continues_to_the_same_bits(
    finished: Result, tiny: Tiny, tmp_path: Path, quiet: Console, number: signal.Signals, status: int, step: int
) -> None:
    written = Interrupter(f"step {step}/6", number)
    stopped = train(tiny(), tmp_path / "run", console=Console(file=written))
    assert (stopped.interrupted, stopped.exit_status) == (number, status)
    assert stopped.step == step and math.isnan(stopped.bits_per_byte)
    assert written.getvalue().endswith(
        f"{number.name}: saved step {step} of 6; the same command continues from there\n"
    )
    continued = train(tiny(), tmp_path / "run", console=quiet)
    assert (continued.step, continued.bits_per_byte) == (6, finished.bits_per_byte)
    assert_same_bits(continued.state, finished.state)
    assert measurements(continued.path) == measurements(finished.path)
    assert manifest(continued.path, 6) == manifest(finished.path, 6)  # the position in the data among others


def test_a_finished_run_has_nothing_left_to_do(
    finished: Result, tiny: Tiny, copy: Path, quiet: Console, contents: Contents
) -> None:
    before = contents(copy)
    again = train(tiny(), copy, console=quiet)
    assert (again.step, again.bits_per_byte) == (6, finished.bits_per_byte)
    assert_same_bits(again.state, finished.state)
    after = contents(copy)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert all(name == "environment.json" or name.startswith("tensorboard/") for name in changed)


def test_a_step_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(
    tiny: Tiny, tmp_path: Path, quiet: Console, contents: Contents
) -> None:
    experiment = tiny(optimizer=Explode(), checkpoint_every=1)
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(NonFinite) as error:
            train(experiment, tmp_path / "run", console=quiet)
        message = str(error.value)
        assert re.match(r"step 2: loss \S+, gradient norm (nan|inf);", message) and "\n" not in message
        assert re.search(r"parameters have a gradient that is not finite: embedding (nan|inf)", message)
        assert f"the last good checkpoint is 1 in {tmp_path / 'run' / 'checkpoints'}" in message
        assert [(line["step"], line["split"]) for line in read_metrics(tmp_path / "run")] == [
            (1, "train"),
            (1, "routers"),
        ]
        checkpoints = contents(tmp_path / "run" / "checkpoints")
        assert {name.split("/")[0] for name in checkpoints} == {"1"}
    trained = load_trained(tmp_path / "run")
    assert trained.step == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))


def test_init_from_starts_with_the_best_parameters_of_another_run(
    finished: Result, tiny: Tiny, copy: Path, tmp_path: Path, quiet: Console
) -> None:
    worse = finished.state._replace(params=jax.tree.map(jnp.zeros_like, finished.state.params))
    with Checkpoints(copy / "checkpoints", metric=METRIC) as checkpoints:
        checkpoints.save(7, worse, metrics={METRIC: 99.0})
    started = train(tiny(evaluate_every=1), tmp_path / "run", init_from=copy, console=quiet)
    held_out = {line["step"]: line for line in read_metrics(started.path) if line["split"] == "held_out"}
    # The learning rate of the first step is 0.
    assert held_out[1]["bits_per_byte"] == finished.bits_per_byte
    assert started.bits_per_byte < finished.bits_per_byte
    assert started.state.step == 6


def test_profile_writes_a_trace(tiny: Tiny, tmp_path: Path, quiet: Console) -> None:
    train(tiny(), tmp_path / "run", profile=True, console=quiet)
    assert list((tmp_path / "run" / "profile").rglob("*.trace.json.gz"))


REFUSED: dict[str, tuple[Callable[[Tiny, Path], Experiment], str]] = {
    "vocabulary": (
        lambda tiny, _: tiny(model=dataclasses.replace(tiny().model, vocab=200)),
        "vocab=200: .* has 258 ids; allowed are models with at least as many",
    ),
    "no such text": (
        lambda tiny, folder: tiny(source=TextFiles(train=(f"{folder}/*.txt",))),
        "train: .* matches no file; allowed are paths and globs of existing files",
    ),
    "no text": (
        lambda tiny, folder: tiny(source=TextFiles(train=(f"{folder}/noise",))),
        "train: .*noise is not UTF-8 text .*; allowed are UTF-8 files",
    ),
    "empty": (
        lambda tiny, folder: tiny(source=TextFiles(train=(f"{folder}/empty",))),
        "training split has 0 documents with 0 tokens",
    ),
    "shorter than a window": (
        lambda tiny, folder: tiny(source=TextFiles(train=(f"{folder}/short",)), sequence_length=100),
        "training split has 1 documents with .* tokens; .*100",
    ),
    "mesh": (
        lambda tiny, _: tiny(mesh=dataclasses.replace(tiny().mesh, data=3)),
        "mesh is .*data=3.*take 3 devices; 1 are there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_before_anything_is_written(case: str, tiny: Tiny, tmp_path: Path, quiet: Console) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a\nb\n" * 10)
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        train(build(tiny, tmp_path), tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_configuration_is_left_alone(
    tiny: Tiny, copy: Path, quiet: Console, contents: Contents
) -> None:
    before = contents(copy)
    with pytest.raises(ValueError, match="another configuration .steps: 6 in the run directory, 7 now; seed: 0 .* 5"):
        train(tiny(steps=7, seed=5), copy, console=quiet)
    assert contents(copy) == before


def test_a_directory_that_is_no_run_is_left_alone(
    tiny: Tiny, tmp_path: Path, quiet: Console, contents: Contents
) -> None:
    (tmp_path / "thesis.tex").write_text("my thesis")
    with pytest.raises(ValueError, match=r"it is not empty and no run, it holds \['thesis.tex'\]"):
        train(tiny(), tmp_path, console=quiet)
    assert contents(tmp_path) == {"thesis.tex": b"my thesis"}


def test_init_from_another_model_lists_every_difference(
    tiny: Tiny, copy: Path, tmp_path: Path, quiet: Console, contents: Contents
) -> None:
    before = contents(copy)
    wider = dataclasses.replace(tiny().model, vocab=260, width=32)
    with pytest.raises(ValueError) as error:
        train(tiny(model=wider), tmp_path / "run", init_from=copy, console=quiet)
    names = ["embedding", "head_kernel", "final_norm.scale", "attention.query", "router.gate.kernel", "experts.down"]
    assert all(name in str(error.value) for name in names)
    assert "[258,16]" in str(error.value) and "[260,32]" in str(error.value)
    assert not (tmp_path / "run").exists()
    assert contents(copy) == before


def test_init_from_no_run_is_refused(tiny: Tiny, tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(ValueError, match="run directory .*nowhere: no such directory"):
        train(tiny(), tmp_path / "run", init_from=tmp_path / "nowhere", console=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("abandoned_reads")
def test_a_truncated_checkpoint_is_named_with_the_others_and_nothing_is_overwritten(
    tiny: Tiny, copy: Path, quiet: Console, contents: Contents
) -> None:
    state = max((copy / "checkpoints" / "6" / "state").rglob("*"), key=lambda file: file.stat().st_size)
    os.truncate(state, state.stat().st_size // 2)
    before = contents(copy)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/6 is damaged: .*other steps to restore: \[2, 4\]"):
        train(tiny(), copy, console=quiet)
    after = contents(copy)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"environment.json"}


def test_a_decoder_of_another_dtype_trains(tiny: Tiny, tmp_path: Path, quiet: Console, dense_model: Decoder) -> None:
    model = dataclasses.replace(dense_model, dtype="bfloat16", remat=True)
    result = train(tiny(model=model, steps=2, evaluate_every=2), tmp_path / "run", console=quiet)
    assert math.isfinite(result.bits_per_byte)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}
