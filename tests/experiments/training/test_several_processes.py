"""`dynamoe train --distributed`: several processes compute what one does, stop together, and continue in other numbers.

`equal_runs` is for other tests too: give it a recipe, and it compares 2 processes of 4 devices with 1 process of 8.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.run_directory import read_metrics

Start = Callable[..., list[subprocess.Popen[str]]]

COMMAND = [sys.executable, "-c", "from dynamoe.experiments.cli import main; main()", "train"]
SIZES = ("--steps", "16", "--batch-size", "8", "--checkpoint-every", "4", "--evaluate-every", "8")
EVERY_DISPATCHER = Path(__file__).with_name("every_dispatcher.py")
PATIENCE = 600.0
DRAWN = re.compile(r"\[Gloo\].*\n|.*is connected to \d+ peer ranks.*\n|.*SIGTERM caught at.*\n")
"""What JAX's runtime prints in every process."""


def train(start: Start, recipe: Path, run: Path, *options: str, count: int = 1, devices: int = 8) -> list[Any]:
    """Start `dynamoe train` in one process or a job of several."""
    job = ["--distributed", "--job.heartbeat-timeout", "10"] if count > 1 else []
    return start(count, devices, [*COMMAND, str(recipe), *job, "--run-dir", str(run), *options])


def ended(children: list[Any]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each process, without what the runtime prints."""
    ends = [child.communicate(timeout=PATIENCE) for child in children]
    return [
        (child.returncode, DRAWN.sub("", output), DRAWN.sub("", errors))
        for child, (output, errors) in zip(children, ends, strict=True)
    ]


def done(children: list[Any]) -> list[str]:
    ends = ended(children)
    assert [status for status, *_ in ends] == [0] * len(ends), ends
    return [output for _, output, _ in ends]


def losses(run: Path) -> dict[tuple[int, str], float]:
    names = {"train": "loss", "held_out": "bits_per_byte"}
    return {
        (line["step"], line["split"]): line[names[line["split"]]]
        for line in read_metrics(run)
        if line["split"] in names
    }


def equal_runs(start: Start, recipe: Path, folder: Path, *options: str) -> tuple[Path, Path, list[str]]:
    """Train in 2 processes of 4 devices and in 1 process of 8, and compare every loss.

    Returns both runs' directories, and what each of the two processes printed.
    """
    several, one = folder / "several", folder / "one"
    outputs = done(train(start, recipe, several, *options, count=2, devices=4))
    done(train(start, recipe, one, *options))
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    return several, one, outputs


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, recipe_text: str, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copy(text, folder / "text.txt")
    (folder / "mine.py").write_text(recipe_text)
    return folder / "mine.py"


def wait_for_step(children: list[Any], run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while last_step(run) < step:
        assert all(child.poll() is None for child in children), ended(children)
        assert time.monotonic() < deadline, f"no step {step} in {PATIENCE} s"
        time.sleep(0.01)


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def test_two_processes_of_four_devices_do_what_one_of_eight_does_with_every_dispatcher(
    start_processes: Start, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)  # experts are exchanged between the processes
    several, _, (first, second) = equal_runs(
        start_processes, EVERY_DISPATCHER, tmp_path, "--mesh.expert", "8", "--model.layers", "7"
    )
    assert len(losses(several)) == 5 and (several / "report.html").is_file()
    assert "process 0 of 2; 4 of 8 devices" in first and first.count("report: ") == 1
    assert second == ""
    (entry,) = json.loads((several / "environment.json").read_text())
    assert entry["processes"] == 2


def test_signals_and_kills_of_one_process_end_all_and_lose_nothing(
    start_processes: Start, recipe_file: Path, tmp_path: Path
) -> None:
    done(train(start_processes, recipe_file, tmp_path / "one", *SIZES, devices=1))

    run = tmp_path / "run"
    job = train(start_processes, recipe_file, run, *SIZES, count=2, devices=2)
    wait_for_step(job, run, 3)
    job[1].send_signal(signal.SIGTERM)  # the notice reaches one process
    ends = ended(job)
    assert [status for status, *_ in ends] == [0, 0], ends
    saved = re.search(r"SIGTERM in one of 2 processes: saved step (\d+) of 16; the same command continues", ends[0][1])
    assert saved and 3 <= int(saved[1]) < 16 and (run / "checkpoints" / saved[1]).is_dir()

    job = train(start_processes, recipe_file, run, *SIZES, count=2, devices=2)
    wait_for_step(job, run, int(saved[1]) + 1)
    job[1].kill()
    begin = time.monotonic()
    (status, _, errors), _ = ended(job)
    assert time.monotonic() - begin < 60 and status != 0
    assert "process 1" in errors and "Start the same command again" in errors

    done(train(start_processes, recipe_file, run, *SIZES, devices=1))
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_processes_with_another_recipe_or_seed_are_refused_before_a_write(
    start_processes: Start, recipe_file: Path, tmp_path: Path
) -> None:
    shell = f'exec "$@" --seed $JAX_PROCESS_ID --run-dir {tmp_path / "run"}'
    command = ["sh", "-c", shell, "sh", *COMMAND, str(recipe_file), "--distributed"]
    (status, _, errors), (other, _, said) = ended(start_processes(2, 1, command))
    assert (status, other, said) == (1, 1, "")
    assert "the processes of the job differ (experiment.seed: 0 in process 0, 1 in process 1)" in errors
    assert not (tmp_path / "run").exists()


def test_bad_data_in_one_process_ends_all(start_processes: Start, recipe_file: Path, tmp_path: Path) -> None:
    broken = "import os, dynamoe.experiments.training.loop as loop\n"
    broken += "place, windows = loop.to_device, []\n"
    broken += "def to_device(batch, layout):\n"
    broken += "    windows.append(batch)\n"
    broken += "    if len(windows) == 3 and os.environ['JAX_PROCESS_ID'] == '1': raise ValueError('row 7 is no text')\n"
    broken += "    return place(batch, layout)\n"
    broken += "loop.to_device = to_device\n"
    command = [sys.executable, "-c", broken + COMMAND[2], "train", str(recipe_file), "--distributed"]
    (status, _, errors), (other, _, said) = ended(
        start_processes(2, 1, [*command, "--run-dir", str(tmp_path / "run"), *SIZES])
    )
    assert (status, other) == (1, 1)
    assert said.startswith("dynamoe: error: row 7 is no text\n")
    assert "process 1" in errors and "row 7 is no text" in errors
