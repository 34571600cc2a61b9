"""Configurations survive JSON, and whatever is no configuration is refused with one message."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamoe.experiments.serialization import differences, from_json, load_recipe, to_json

RECIPE = """
from __future__ import annotations
import dataclasses
from pathlib import Path
from sibling import Optimizer

@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    experts: int = 8
    jitter: float = 0.0

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError(f"experts is {self.experts}; it must be at least 1")

class Models:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Tiny:
        routers: tuple[Router, ...] = (Router(), Router(experts=2))

@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str = "first"
    model: Models.Tiny = Models.Tiny()
    optimizer: Optimizer | None = Optimizer()
    router: Router = Router()
    data: Path | None = Path("/data/text")
    split: tuple[float, int] = (0.9, 1)
    budget: float = float("inf")
    shuffle: bool = True

def recipe():
    return Experiment()
"""
SIBLING = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Optimizer:
    rate: float = 1e-3
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    number: int = 1
    real: float = 0.5
    text: str = ""
    flag: bool = False
    path: Path | None = None
    many: tuple[float, ...] = ()


@dataclasses.dataclass
class Thawed:
    number: int = 1


@dataclasses.dataclass(frozen=True)
class Typed:
    type: str = "x"


@dataclasses.dataclass(frozen=True)
class Holder:
    value: Any = None


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "sibling.py").write_text(SIBLING)
    (tmp_path / "mine.py").write_text(RECIPE)
    yield tmp_path / "mine.py"
    sys.path[:] = path
    for name in {"sibling", "recipe"} - modules:
        sys.modules.pop(name, None)


paths = st.text("abc/. é", min_size=1).map(Path)


@given(
    st.builds(
        Values,
        number=st.integers(),
        real=st.floats(allow_nan=False),
        text=st.text(),
        flag=st.booleans(),
        path=st.none() | paths,
        many=st.lists(st.floats(allow_nan=False)).map(tuple),
    )
)
def test_every_value_comes_back_equal(config: Values) -> None:
    data = json.loads(json.dumps(to_json(config), allow_nan=False))
    found = from_json(data)
    assert found == config
    assert repr(found) == repr(config)  # tells 1 from 1.0 and 0.0 from -0.0
    assert differences(data, to_json(found)) == []


def test_not_a_number_comes_back() -> None:
    assert math.isnan(from_json(to_json(Values(real=math.nan))).real)


def test_a_recipes_own_classes_come_back(recipe: Path) -> None:
    module = load_recipe(recipe)
    config = module.recipe()
    data = json.loads(json.dumps(to_json(config), allow_nan=False))
    assert data["type"] == "recipe:Experiment"
    assert data["model"] == {
        "type": "recipe:Models.Tiny",
        "routers": [
            {"type": "recipe:Router", "experts": 8, "jitter": 0.0},
            {"type": "recipe:Router", "experts": 2, "jitter": 0.0},
        ],
    }
    assert data["optimizer"]["type"] == "sibling:Optimizer"
    assert data["data"] == {"path": "/data/text"}
    assert from_json(data, module) == config
    from_file = from_json(data, recipe)
    assert repr(from_file) == repr(config)
    assert type(from_file) is not type(config)  # the file was executed again


def test_a_recipes_copy_finds_its_siblings_in_the_folder_given(recipe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "recipe.py"
    copy.parent.mkdir()
    copy.write_text(recipe.read_text())
    with pytest.raises(ValueError, match="line 5: ModuleNotFoundError: No module named 'sibling'"):
        load_recipe(copy)
    assert load_recipe(copy, folder=recipe.parent).recipe().name == "first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\nraise KeyError('no')\n", r"mine.py, line 3: KeyError: 'no'"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"mine.py, line 2: ZeroDivisionError"),
        ("x = (\n", r"mine.py, line 1: SyntaxError"),
        ("x = 1\n", r"mine.py: it defines no function recipe\(\)"),
        ("recipe = 3\n", r"mine.py: it defines no function recipe\(\)"),
    ],
)
def test_a_bad_recipe_is_named_with_its_line(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe .*/none.py: no such file"):
        load_recipe(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "os:path"}, "os:path; it must be a frozen dataclass"),
        ({"type": "os:system"}, "os:system; it must be a frozen dataclass"),
        ({"type": "nowhere.at.all:Class"}, "there is no such class: No module named 'nowhere'"),
        ({"type": "dataclasses:Nothing"}, "there is no such class"),
        ({"type": "Values"}, 'must look like "package.module:Class"'),
        ({"type": 3}, 'must look like "package.module:Class"'),
        ({"type": "recipe:Experiment"}, "give that recipe file"),
        ({"depth": 1}, r"unknown fields \['depth'\], missing fields \[\]; it has \['number', 'real'"),
        ({"number": "4"}, 'config.number is "4"; allowed is int'),
        ({"number": 4.0}, "config.number is 4.0; allowed is int"),
        ({"number": True}, "config.number is True; allowed is int"),
        ({"real": "x"}, 'config.real is "x"; allowed is float'),
        ({"flag": 1}, "config.flag is 1; allowed is bool"),
        ({"path": "x"}, r'config.path is "x"; allowed is pathlib.Path \| None'),
        ({"many": [1.0, "x"]}, r"config.many is .*; allowed is tuple\[float, ...\]"),
        ({"many": {"a": 1}}, 'an object must have a "type"'),
        ({"real": {"float": "many"}}, 'an object must have a "type"'),
    ],
)
def test_wrong_json_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(Values()), **changes})


def test_a_missing_field_is_refused_even_with_a_default() -> None:
    data = to_json(Values())
    del data["real"]
    with pytest.raises(ValueError, match=r"unknown fields \[\], missing fields \['real'\]"):
        from_json(data)


@pytest.mark.parametrize("data", [None, 3, [], {}, {"number": 1}, "config"])
def test_what_is_no_configuration_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="must be an object with a"):
        from_json(data)


def test_what_a_class_refuses_is_passed_on(recipe: Path) -> None:
    data = to_json(load_recipe(recipe).recipe())
    data["router"]["experts"] = 0
    with pytest.raises(ValueError, match="config.router: recipe:Router refuses these values: experts is 0; it must be"):
        from_json(data, recipe)


def test_a_class_in_the_wrong_place_is_refused(recipe: Path) -> None:
    data = to_json(load_recipe(recipe).recipe())
    data["router"] = data["optimizer"]
    with pytest.raises(ValueError, match=r"config.router is .*; allowed is Router"):
        from_json(data, recipe)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "config is 3; it must be a frozen dataclass"),
        (Values, "it must be a frozen dataclass"),
        (Thawed(), "Thawed, which is not frozen"),
        (Typed(), 'with a field "type"; that name is taken'),
        (Holder([1]), r"config.value is \[1\] of type list; allowed are"),
        (Holder((1, {2})), r"config.value\[1\] is \{2\} of type set; allowed are"),
        (Holder(Holder(len)), "config.value.value is <built-in function len> of type builtin_function_or_method"),
        (Values(number="3"), 'config.number is "3"; allowed is int'),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_stored_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_json(config)


def test_a_class_inside_a_function_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Local:
        number: int = 1

    with pytest.raises(ValueError, match=r"<locals>.Local, which another process could not import"):
        to_json(Local())


def test_differences_name_each_field_once(recipe: Path) -> None:
    module = load_recipe(recipe)
    old = to_json(module.recipe())
    new = to_json(
        dataclasses.replace(
            module.recipe(),
            name="second",
            model=module.Models.Tiny(routers=(module.Router(), module.Router(experts=3))),
            optimizer=None,
            router=module.Router(jitter=0.1),
            data=Path("/data/other"),
        )
    )
    assert differences(old, new) == [
        'name: "first" in the run directory, "second" now',
        "model.routers[1].experts: 2 in the run directory, 3 now",
        "optimizer: sibling:Optimizer in the run directory, None now",
        "router.jitter: 0.0 in the run directory, 0.1 now",
        'data.path: "/data/text" in the run directory, "/data/other" now',
    ]
    assert differences(old, old) == []
    del old["name"]
    assert differences(old, to_json(module.recipe())) == ['name: "absent" in the run directory, "first" now']
