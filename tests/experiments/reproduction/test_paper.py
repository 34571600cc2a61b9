"""A paper's file says what it must, and is found by name or path."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.reproduction import BITS_PER_BYTE, DROPPED, Lower, Paper
from dynamoe.experiments.reproduction.paper import find_paper, paper_names

ABOUT = """Old and New: new beats old.

Claim: New is better,
by 0.1.

Command: dynamoe reproduce it
Cost: nothing.
"""
CLAIM = Lower(says="New beats old.", published="-0.1", measure=BITS_PER_BYTE, arm="new", than="old")


@pytest.fixture
def paper(tiny: Callable[..., Experiment]) -> Callable[..., Paper]:
    """`paper(about=...)`: a paper of two arms, with single values changed."""
    whole: dict[str, Any] = {"about": ABOUT, "arms": {"old": tiny(), "new": tiny(steps=7)}, "claims": (CLAIM,)}
    return lambda **changed: Paper(**(whole | changed))


def test_paragraphs_are_read_from_the_docstring(paper: Callable[..., Paper]) -> None:
    made = paper()
    assert made.title == "Old and New: new beats old."
    read = [made.paragraph(name) for name in ("Claim", "Command", "Cost")]
    assert read == ["New is better, by 0.1.", "dynamoe reproduce it", "nothing."]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"about": ABOUT.replace("Cost", "Price")}, "about has no paragraph that begins with 'Cost: '"),
        ({"claims": ()}, "claims is empty"),
        ({"claims": (dataclasses.replace(CLAIM, than="older"),)}, "claims name the arm 'older'; there are old, new"),
        (
            {"claims": (dataclasses.replace(CLAIM, measure=DROPPED),)},
            "claims name the measure 'held-out share dropped'; measures has held-out bits per byte",
        ),
    ],
)
def test_what_does_not_fit_is_refused(paper: Callable[..., Paper], changed: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        paper(**changed)


def test_an_arm_has_a_name_that_a_folder_can_have(paper: Callable[..., Paper]) -> None:
    arms = {"old": paper().arms["old"], "../new": paper().arms["new"]}
    with pytest.raises(ValueError, match=r"arms has '\.\./new'"):
        paper(arms=arms)


def test_arms_of_a_seed_differ_in_nothing_else(paper: Callable[..., Paper]) -> None:
    at = paper().at(seed=5)
    assert {name: (arm.seed, arm.steps) for name, arm in at.items()} == {"old": (5, 6), "new": (5, 7)}
    assert paper().at(seed=5, smoke=True)["new"].steps == 2


@pytest.mark.parametrize("name", paper_names())
def test_every_paper_of_ours_names_its_source_command_and_file(name: str) -> None:
    paper = find_paper(name).paper
    assert f"dynamoe reproduce {name}" in paper.paragraph("Command")
    assert "https://arxiv.org/abs/" in paper.about
    assert len({(arm.steps, arm.batch_size, arm.sequence_length, arm.source) for arm in paper.arms.values()}) == 1


def test_an_unknown_paper_is_answered_with_the_names_there_are() -> None:
    names = "loss_free_balancing, megablocks, switch_transformer"
    with pytest.raises(ValueError, match=rf"paper is 'swich'; there are {names}, or give the path of a Python file"):
        find_paper("swich")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine.py: it defines no function paper\(\)"),
        ("def paper():\n    return 3\n", r"mine.py: paper\(\) returned 3; it must return a Paper"),
        ("def paper():\n    return 1 / 0\n", r"mine.py, line 2: ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_paper_is_named(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_paper(str(recipe))
    with pytest.raises(ValueError, match=r"none.py: no such file; give a Python file that defines paper\(\)"):
        find_paper(str(recipe.with_name("none.py")))
