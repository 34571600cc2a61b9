"""What the README shows works."""

import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

from dynamoe.experiments import cli
from dynamoe.experiments.experiment import Experiment
from dynamoe.moe import RoutingContext

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(dynamoe [^#\n]*)", "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.MULTILINE)


def test_readme_recipe_builds_an_experiment() -> None:
    names: dict = {}
    exec(BLOCKS[0], names)
    experiment = names["recipe"]()
    assert isinstance(experiment, Experiment)
    assert experiment.model.feed_forwards[0] != experiment.model.feed_forwards[1]


def test_readme_layer_runs_in_a_model_of_ones_own() -> None:
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["logits"].shape == (32, 10)
    assert names["balance_loss"] > 0


def test_readme_model_is_loaded_and_saved_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ROOT / "tests" / "models" / "checkpoints" / "fixtures" / "olmoe"
    names: dict = {"tokens": jnp.array([[1, 2, 3]])}
    exec(BLOCKS[2].replace("path/to/OLMoE-1B-7B-0924", str(tiny)), names)
    assert jnp.isfinite(names["logits"]).all()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_readme_router_routes_each_token_to_the_nearest_direction() -> None:
    names: dict = {}
    exec(BLOCKS[3], names)
    assert names["y"].shape == (4, 16, 64) and names["stats"].load.max() == 1  # all tokens are the same
    router = names["layer"].router
    tokens = router.directions[...].T * 3.0  # each expert's own direction
    routing, state = router(tokens, RoutingContext(mask=jnp.arange(8) < 6))
    assert routing.expert.tolist() == [0, 1, 2, 3, 4, 5, 8, 8] and state is None


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_recipe.py").write_text(BLOCKS[0])
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[1] / "experiments")
    arguments = shlex.split(command)[1:]
    assert type(cli.parse(arguments)).__name__.lower().startswith(arguments[0])  # or its variant for a classifier


def test_readme_tree_names_files_that_exist() -> None:
    tree = README.split("## The house")[1].split("```")[1]
    folder = ""
    for line in tree.splitlines():
        names, _, _ = line.strip().partition("  ")
        folder = names if line and not line.startswith(" ") else folder
        for name in names.split():
            if re.fullmatch(r"[\w/]+(\.\w+|/)", name):
                assert (ROOT / (name if name == folder else folder + name)).exists(), f"{folder}{name}"


def test_readme_links_lead_to_files_that_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)
