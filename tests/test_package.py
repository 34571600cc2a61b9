"""The package as users get it: what the wheel holds, what imports what, and the rules that the suite runs under."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

import dynamoe
from dynamoe.experiments.ngram import NGram

pytestmark = pytest.mark.smoke

CHECKOUT = Path(dynamoe.__file__).parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
NOT_PACKAGED = {"tests", "examples", "build", "dist", "runs", "dynamoe.egg-info"}

NEED_TRITON = {f"dynamoe.kernels.grouped_matmul.triton_kernels.{name}" for name in ("plain", "packed")}
"""Triton's decorator stands on its kernels; nothing imports them before one is called."""
IMPORT_EVERY_MODULE = f"""
import importlib, pkgutil, sys
import dynamoe

NEED_TRITON = {NEED_TRITON!r}

names = sys.argv[1:] or ["dynamoe"]
for name in names:
    def fail(module):
        raise
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(package.__path__, name + ".", onerror=fail):
        if found.name not in NEED_TRITON:
            importlib.import_module(found.name)
print(dynamoe.__file__)
print(*sorted(module for module in sys.modules if module.split(".")[0] == "dynamoe"))
"""

# Only imports that dynamoe's own files make: flax itself imports optax and orbax.
REFUSE_IMPORTS = """
import builtins, sys

real_import = builtins.__import__
def checked_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    top = name.split(".")[0]
    if importer.split(".")[0] == "dynamoe" and level == 0 and top not in sys.stdlib_module_names | ALLOWED:
        raise ImportError(f"{importer} imports {name}, which is not among {sorted(ALLOWED)}")
    return real_import(name, globals, locals, fromlist, level)
builtins.__import__ = checked_import
"""


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """Run code in a fresh isolated interpreter with JAX as users have it; return its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUMPY_")}
    command = [sys.executable, "-I", "-c", code, *arguments]
    child = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


def files_in_checkout() -> list[Path]:
    """Every file of the package's folders, and those at the root, relative to it."""
    kept = [entry for entry in CHECKOUT.iterdir() if entry.name not in NOT_PACKAGED and not entry.name.startswith(".")]
    files = [file for entry in kept for file in (entry.rglob("*") if entry.is_dir() else [entry]) if file.is_file()]
    return [file.relative_to(CHECKOUT) for file in files if "__pycache__" not in file.parts]


def module_names(files: Iterable[Path]) -> set[str]:
    """Dotted names of the modules among files, which are relative to the package's root."""
    modules = [("dynamoe", *file.with_suffix("").parts) for file in files if file.suffix == ".py"]
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in modules}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no build folder is left in the checkout, and no stale one is read."""
    source = tmp_path_factory.mktemp("source")
    for file in files_in_checkout():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((CHECKOUT / file).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return path


def test_every_folder_with_modules_is_a_listed_package():
    folders = {".".join(("dynamoe", *file.parent.parts)) for file in files_in_checkout() if file.suffix == ".py"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_package_has_an_init_file():
    names = PROJECT["tool"]["setuptools"]["packages"]
    missing = [name for name in names if not (CHECKOUT.joinpath(*name.split(".")[1:]) / "__init__.py").exists()]
    assert not missing


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """A folder outside the checkout with what the wheel holds."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_imports_outside_the_checkout(unpacked):
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{IMPORT_EVERY_MODULE}"
    origin, imported = run_python(code, cwd=unpacked).splitlines()
    assert Path(origin) == unpacked / "dynamoe" / "__init__.py", "the wheel was tested, not the checkout"
    assert set(imported.split()) == module_names(files_in_checkout()) - NEED_TRITON


def test_a_layer_from_the_wheel_trains_in_a_model_that_someone_else_wrote(unpacked, tmp_path):
    code = (CHECKOUT / "tests" / "model_of_ones_own.py").read_text()
    *steps, moved = run_python(code, str(unpacked), cwd=tmp_path).splitlines()
    losses, loads = [float(step.split()[0]) for step in steps], [step.split()[1:] for step in steps]
    assert losses[-1] < 0.2 * losses[0], losses
    assert all(abs(sum(map(float, load)) - 1) < 1e-3 and len(load) == 4 for load in loads)
    distances = [float(distance) for distance in moved.split()[1:]]
    assert len(distances) == 4 and min(distances) > 0.01, "router, gate, up and down were trained"


def test_the_wheel_holds_the_package_its_license_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dynamoe"}
    assert not [name for name in names if "tests" in name.split("/")]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert f"Version: {dynamoe.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata


def test_the_root_module_imports_nothing(tmp_path):
    assert run_python("import sys, dynamoe; print('jax' in sys.modules)", cwd=tmp_path).strip() == "False"


def test_kernels_moe_and_dynamic_import_with_jax_flax_and_numpy_alone(tmp_path):
    allowed = "ALLOWED = {'dynamoe', 'jax', 'jaxlib', 'flax', 'numpy', 'jaxtyping'}"
    code = f"{allowed}\n{REFUSE_IMPORTS}\n{IMPORT_EVERY_MODULE}"
    imported = run_python(code, "dynamoe.kernels", "dynamoe.moe", "dynamoe.dynamic", cwd=tmp_path)
    assert "dynamoe.kernels" in imported and "dynamoe.models" not in imported


def test_every_module_imports_without_the_extras(tmp_path):
    distributions = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    runtime = distributions - {"orbax-checkpoint"} | {"orbax"}  # the one whose import has another name
    code = f"ALLOWED = {runtime | {'dynamoe', 'jaxlib'}!r}\n{REFUSE_IMPORTS}\n{IMPORT_EVERY_MODULE}"
    checkout = module_names(files_in_checkout())
    _, imported = run_python(code, cwd=tmp_path).splitlines()
    assert set(imported.split()) >= checkout - NEED_TRITON


def test_a_refused_import_is_noticed(tmp_path):
    code = f"ALLOWED = {{'dynamoe'}}\n{REFUSE_IMPORTS}\nimport dynamoe.experiments.ngram"
    with pytest.raises(AssertionError, match="dynamoe.experiments.ngram imports numpy, which is not among"):
        run_python(code, cwd=tmp_path)


def test_constraints_pin_every_direct_dependency_of_what_ci_installs():
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {pin.name.lower(): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["data"] + extras["test"] + extras["dev"] + extras["parity"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "dynamoe":
            (pin,) = here[requirement.name.lower()].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement}: {pin}"


def test_one_version_everywhere():
    assert importlib.metadata.version("dynamoe") == dynamoe.__version__
    assert f"\nversion: {dynamoe.__version__}\n" in (CHECKOUT / "CITATION.cff").read_text()
    assert f"\n## {dynamoe.__version__}" in (CHECKOUT / "CHANGELOG.md").read_text()


def test_the_suite_runs_under_strict_promotion(key):
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        jnp.zeros(2, jnp.float32) + jnp.zeros(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rank_promotion"):
        jax.random.normal(key, (2, 3)) + jnp.zeros(3)


def test_the_suite_checks_the_types_that_annotations_name():
    with pytest.raises(Exception, match="type") as caught:
        NGram.fit([np.array([0, 1])], vocab_size="2")
    assert type(caught.value).__module__.split(".")[0] in {"jaxtyping", "beartype"}


def test_a_test_can_switch_the_type_checks_off(unchecked):
    with pytest.raises(ValueError, match="vocab_size=0.5 cannot be counted"):
        NGram.fit([np.array([0, 1])], vocab_size=0.5)


def see_devices(expected: str) -> None:
    assert len(jax.devices()) == int(expected)
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    print("checked")


def test_a_test_can_ask_for_eight_devices(run_with_devices):
    assert run_with_devices(8, see_devices, "8") == "checked\n"
    with pytest.raises(pytest.fail.Exception, match="see_devices failed on 2 devices"):
        run_with_devices(2, see_devices, "3")
