"""`dynamoe plan`: what it prints and writes, and what it refuses before anything is compiled."""

import json
import os
import signal

import pytest

from dynamoe.experiments.planning.compiled import Generation, dying_at_once

FILES = ["memory.png", "plan.json", "plan.md", "time.png"]


@pytest.fixture
def recipe(recipe):
    """With its tokens sent to their experts."""
    text = recipe.read_text()
    recipe.write_text(text.replace("DenseDispatcher", "ExpertParallel"))
    return recipe


def test_a_plan_is_printed_and_written(dynamoe, recipe, planned_without_compiling, tmp_path):
    status, output, errors = dynamoe("plan", recipe, "--mesh.expert", "2", "--output", "out")
    assert (status, errors) == (0, "")
    assert planned_without_compiling == ["data=2 expert=2"]
    for text in ("parameters", "optimizer state", "all-to-all", "an estimate, not a measurement", "no latency"):
        assert text in output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["devices"], plan["mesh"]["data"], plan["steps"][0]["name"]) == (4, 2, "training step")
    assert sum(plan["steps"][0]["memory"].values()) > 0 and plan["steps"][0]["estimate"]["overlapped"] > 0
    page = (tmp_path / "out" / "plan.md").read_text()
    assert page.startswith("# mine on 4 devices of v5e (2x2)") and "| parameters |" in page


def test_without_output_nothing_is_written(dynamoe, recipe, planned_without_compiling, tmp_path):
    assert dynamoe("plan", recipe)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def test_what_does_not_fit_has_status_1(dynamoe, recipe, planned_without_compiling):
    status, output, _ = dynamoe("plan", recipe, "--mesh.tensor", "2")
    assert status == 1
    assert "the training step does not fit: Ran out of memory" in output


def test_a_search_writes_the_best_mesh_as_a_recipe(dynamoe, recipe, planned_without_compiling, tmp_path):
    status, output, errors = dynamoe("plan", recipe, "--search", "--steps", "50")
    assert (status, errors) == (0, "")
    folder = tmp_path / "plans" / "mine_v5e_2x2"
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, "mine_v5e_2x2.py"])
    assert "expert=2" in output.splitlines()[-1] and "not compiled" in output
    text = (folder / "mine_v5e_2x2.py").read_text()
    assert "MeshShape(" in text and "expert=2" in text and "steps=50" in text
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["meshes"]) == 9
    assert [mesh["mesh"]["tensor"] for mesh in plan["do_not_divide"]] == [4]  # there are two heads


def test_a_search_in_which_nothing_fits_writes_no_recipe(dynamoe, recipe, planned_without_compiling, tmp_path):
    status, output, _ = dynamoe("plan", recipe, "--search", "--batch-size", "2", "--output", "out")
    assert status == 1
    assert "there is no recipe to write" in output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chip", "v5q"), "chip is 'v5q'"),
        (("--topology", "3x3"), "topology is '3x3'"),
        (("--mesh.data", "3"), "v5e 2x2 has 4 devices"),
        (("--mesh.data", "1", "--mesh.expert", "4", "--model.ffn.experts", "6"), "axis 'expert' of"),
        (("--chip", "v5p", "--topology", "4x4x4", "--mesh.data", "8", "--mesh.fsdp", "8"), "cannot hold it"),
        (("--batch-size", "6"), "batch_size / gradient_accumulation has length 6"),
        (("--phase", "generation", "--generation.rows", "3"), "generation.rows has length 3"),
        (("--output", "recipe/mine.py"), "it is a file; give a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(dynamoe, recipe, planned_without_compiling, options, message):
    status, _, errors = dynamoe("plan", recipe, *options)
    assert status == 1
    assert errors.startswith("dynamoe: error: ") and message in errors
    assert planned_without_compiling == []


def test_a_search_of_generation_is_wrong_usage(dynamoe, recipe):
    status, _, errors = dynamoe("plan", recipe, "--search", "--phase", "all")
    assert status == 2 and "meshes are compared by their" in errors


def test_the_command_keeps_jax_off_the_chips(dynamoe, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert dynamoe("plan", "--help")[0] == 0
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_ctrl_c_ends_a_compiler_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), dying_at_once():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_sizes_of_generation_are_checked():
    with pytest.raises(ValueError, match="generation.rows is 0; it must be at least 1"):
        Generation(rows=0)
