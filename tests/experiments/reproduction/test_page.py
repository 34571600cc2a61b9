"""The page and the picture show what the results hold; what is committed is what the results make."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from dynamoe.experiments.commands.reproduce import RESULTS
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.reproduction import BITS_PER_BYTE, DROPPED, Faster, Lower, Paper
from dynamoe.experiments.reproduction.page import page, table
from dynamoe.experiments.reproduction.paper import Found, find_paper
from dynamoe.experiments.reproduction.picture import draw_results
from dynamoe.experiments.reproduction.results import collect, findings_of, judge, with_step_time

COMMITTED = sorted(RESULTS.glob("*.json"))
ENVIRONMENT = {
    "started": "2026-11-27T08:00:00+00:00",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "system": "Linux",
    "cores": 2,
    "devices": ["cpu"],
    "recipe": "/home/somebody/mine.py",
}
BITS = {"old": (2.2, 2.5, 2.9), "new": (2.1, 2.39, 2.81)}  # differences -0.1, -0.11, -0.09


@pytest.fixture
def results(tiny: Callable[..., Experiment]) -> dict[str, Any]:
    """Made-up numbers of two arms: new is better by 0.1 and takes 0.9 times as long."""
    options: dict[str, Any] = {"published": "-0.2", "arm": "new", "than": "old"}
    paper = Paper(
        about="Old: new beats old.\n\nClaim: It does.\n\nCommand: dynamoe reproduce it\n\nCost: nothing.",
        arms={"old": tiny(), "new": tiny(steps=7)},
        measures=(BITS_PER_BYTE, DROPPED),
        claims=(
            Lower(says="New is better.", measure=BITS_PER_BYTE, **options),
            Faster(says="New is faster.", **options),
        ),
    )
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "measures": {BITS_PER_BYTE.name: value, DROPPED.name: None if arm == "old" else 0.1},
            "seconds": None if seed else 60.4,
            "finished": "2026-11-27T08:00:00+00:00",
            "environment": ENVIRONMENT | {"source": {"sha256": "ab"}},
        }
        for arm, values in BITS.items()
        for seed, value in enumerate(values)
    ]
    seconds = {"old": [0.1] * 6, "new": [0.09, 0.08, 0.085, 0.09, 0.095, 0.095]}
    step_time = {"seconds": seconds, "environment": ENVIRONMENT}
    made = collect(Found("it", paper, None), runs, step_time)
    assert [finding.verdict for finding in findings_of(made)] == ["reproduced", "reproduced"]
    slower = with_step_time(paper, made, {"seconds": seconds | {"new": [0.2] * 6}, "environment": ENVIRONMENT})
    assert (made["verdict"], slower["verdict"]) == ("reproduced", "not reproduced")
    assert slower["runs"] == made["runs"]
    return json.loads(json.dumps(made))


def test_the_page_shows_verdicts_estimates_and_every_run(results: dict[str, Any]) -> None:
    text = page(results)
    assert text.startswith("# Old: new beats old.\n") and "**Reproduced**, on " in text
    # Mean -0.1, half the interval 4.30265 * 0.01 / sqrt(3) = 0.0248, detectable 5.65349 * 0.00577 = 0.0326.
    assert "| -0.1000 | -0.1248 to -0.0752 | 0.0326 | below 0 | **reproduced** |" in text
    assert "| step time, new / old | 0.900 | 0.800 to 0.950 |  | below 1 | **reproduced** |" in text
    assert "| `new` | 1 | 2.3900 | 0.1000 | continued | 2026-11-27T08:00:00+00:00 |" in text
    assert "2.5333 ± 0.3512 | – |" in text  # the arm without the second measure
    assert "3 pairs are few: the interval reaches 4.3 standard errors" in text
    assert "python 3.11.7, jax 0.10.2; Linux, 2 cores, cpu." in text and "somebody" not in text


def test_runs_in_unlike_surroundings_are_pointed_out(results: dict[str, Any]) -> None:
    assert len(results["environments"]) == 1 and "Not all runs" not in page(results)
    results["environments"].append(results["environments"][0] | {"cores": 8})
    assert "Not all runs had the same surroundings; there were 2:" in page(results)


def test_a_smoke_test_cannot_pass_for_a_result(results: dict[str, Any]) -> None:
    assert "smoke" not in page(results)
    assert "They mean nothing." in page(results | {"smoke": True})


def test_the_picture_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    picture = matplotlib.image.imread(draw_results(results, tmp_path / "it.png"))
    assert picture.shape[1] == 1080 and picture.std() > 0.05


def test_a_table_holds_what_a_cell_says() -> None:
    assert table(("a", "b"), [("x|y", "-1.5")]) == "| a | b |\n| --- | ---: |\n| x\\|y | -1.5 |"


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_committed_page_is_what_its_results_make(file: Path) -> None:
    results = json.loads(file.read_text())
    assert page(results) == file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").is_file() and not results["smoke"]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_committed_verdict_is_what_the_papers_rule_says(file: Path) -> None:
    results = json.loads(file.read_text())
    found = judge(find_paper(file.stem).paper, results)
    for stored, now in zip(findings_of(results), found, strict=True):
        assert now._replace(estimate=None) == stored._replace(estimate=None)
        assert now.estimate == pytest.approx(stored.estimate)
    assert len(results["seeds"]) >= 3
    assert sorted((run["arm"], run["seed"]) for run in results["runs"]) == sorted(
        (arm, seed) for arm in results["arms"] for seed in results["seeds"]
    )


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_name_no_path_of_a_machine(file: Path) -> None:
    assert not re.search(r"/(home|root|work|tmp|Users)/", file.read_text())
