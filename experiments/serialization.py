"""Configurations as JSON and back, and the recipe files that build them.

A configuration is a tree of frozen dataclasses, tuples, paths and plain values. In JSON a dataclass is
`{"type": "package.module:Class", field: value, ...}`, a tuple a list, a path `{"path": "..."}` and a float that is not
finite `{"float": "inf"}`. Reading builds frozen dataclasses from such a tree and nothing else.
"""

import dataclasses
import importlib
import json
import math
import re
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Any

RECIPE = "recipe"
ALLOWED = "allowed are frozen dataclasses, tuples, int, float, str, bool, None and Path"


def to_json(config: Any) -> dict[str, Any]:
    """Writes a configuration as a JSON tree that `from_json` turns back into an equal configuration.

    Args:
      config: a frozen dataclass of plain values, paths, tuples and further frozen dataclasses. Their classes are
        importable, or come from a recipe file.

    Raises:
      ValueError: a value of another type, a value that its field's annotation does not allow, or a class that could not
        be found again.
    """
    if not _is_instance_of_dataclass(config):
        raise ValueError(f"config is {config!r}; it must be a frozen dataclass")
    return _encode(config, "config")


def from_json(data: Any, recipe: Path | types.ModuleType | None = None) -> Any:
    """Builds the configuration that `to_json` wrote.

    Args:
      data: the JSON tree.
      recipe: the recipe file, or the module that `load_recipe` made of it, if the tree names classes of a recipe.

    Raises:
      ValueError: the tree is no configuration: an unknown class, one that is no frozen dataclass, an unknown or missing
        field, a value that the field does not allow or that its class refuses.
    """
    module = load_recipe(recipe) if isinstance(recipe, Path) else recipe
    if not (isinstance(data, dict) and "type" in data):
        raise ValueError(f'the configuration is {_brief(data)}; it must be an object with a "type"')
    return _decode(data, "config", module)


def changes(old: Any, new: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """Lists `(field, old value, new value)` where two JSON trees differ. A side without the field has `"absent"`."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        names = [*old, *(name for name in new if name not in old)]
        children = [
            (f"{field}.{name}" if field else name, old.get(name, "absent"), new.get(name, "absent")) for name in names
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        children = [(f"{field}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if type(old) is type(new) and old == new else [(field or "config", old, new)]
    return [change for name, before, after in children for change in changes(before, after, name)]


def differences(old: Any, new: Any, there: str = "in the run directory", here: str = "now") -> list[str]:
    """Says where a stored JSON configuration and today's differ: `model.layers: 4 in the run directory, 6 now`."""
    return [f"{field}: {_brief(a)} {there}, {_brief(b)} {here}" for field, a, b in changes(old, new)]


def load_recipe(path: Path, folder: Path | None = None, *, function: str | None = RECIPE) -> types.ModuleType:
    """Executes a recipe file as the module `recipe`.

    Like `python path`, it puts the file's folder first on `sys.path`, so that the recipe imports its siblings.

    Args:
      path: a Python file that defines `recipe()`, which returns the experiment's configuration.
      folder: where its siblings lie, if not beside it (a copy of the file in a run directory).
      function: what it has to define; None: nothing, for its classes alone are wanted.

    Raises:
      ValueError: no such file, an exception in it (named with its line), or no such function in it.
    """
    path = path.absolute()
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file; give a Python file that defines {function or RECIPE}()")
    for place in (path.parent, folder):
        if place is not None and str(place) not in sys.path:
            sys.path.insert(0, str(place))
    module = types.ModuleType(RECIPE)
    module.__file__ = str(path)
    previous = sys.modules.get(RECIPE)
    sys.modules[RECIPE] = module  # dataclasses looks its annotations up there
    try:
        with tokenize.open(path) as file:
            exec(compile(file.read(), str(path), "exec"), vars(module))
    except Exception as error:
        sys.modules.pop(RECIPE)
        if previous is not None:
            sys.modules[RECIPE] = previous
        raise _recipe_error(error, path) from error
    if function is not None and not callable(getattr(module, function, None)):
        raise ValueError(f"recipe {path}: it defines no function {function}(); it must return the configuration")
    return module


def call_recipe(path: Path, function: str = RECIPE) -> Any:
    """Executes a recipe file and returns what its `recipe()`, or another function of it, builds.

    Raises:
      ValueError: as `load_recipe`, or an exception in the function (named with its line).
    """
    module = load_recipe(path, function=function)
    try:
        return getattr(module, function)()
    except Exception as error:
        raise _recipe_error(error, path.absolute()) from error


def _recipe_error(error: Exception, path: Path) -> ValueError:
    return ValueError(f"recipe {path}{_line_of(error, path)}: {type(error).__name__}: {error}")


def _line_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def _encode(value: Any, where: str) -> Any:
    if _is_instance_of_dataclass(value):
        cls = type(value)
        hints = _hints(cls)
        data = {"type": _name_of(cls, where)}
        for name in _field_names(cls, where):
            child = getattr(value, name)
            data[name] = _encode(child, f"{where}.{name}")
            _check_fits(child, hints.get(name, Any), f"{where}.{name}")
        return data
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if type(value) is tuple:
        return [_encode(child, f"{where}[{i}]") for i, child in enumerate(value)]
    raise ValueError(f"{where} is {_brief(value)} of type {type(value).__name__}; {ALLOWED}")


def _decode(data: Any, where: str, recipe: types.ModuleType | None) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return tuple(_decode(child, f"{where}[{i}]", recipe) for i, child in enumerate(data))
    if isinstance(data, dict) and "type" in data:
        return _decode_dataclass(data, where, recipe)
    match data:
        case {"path": str(path)} if len(data) == 1:
            return Path(path)
        case {"float": "inf" | "-inf" | "nan" as number} if len(data) == 1:
            return float(number)
    raise ValueError(f'{where} is {_brief(data)}; an object must have a "type", or be {{"path": ...}}')


def _decode_dataclass(data: dict[str, Any], where: str, recipe: types.ModuleType | None) -> Any:
    cls = _find_class(data["type"], where, recipe)
    names = _field_names(cls, where)
    unknown = [name for name in data if name not in (*names, "type")]
    missing = [name for name in names if name not in data]
    if unknown or missing:
        raise ValueError(
            f"{where}, a {data['type']}: unknown fields {unknown}, missing fields {missing}; it has {list(names)}"
        )
    hints = _hints(cls)
    values = {name: _decode(data[name], f"{where}.{name}", recipe) for name in names}
    for name, value in values.items():
        _check_fits(value, hints.get(name, Any), f"{where}.{name}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {data['type']} refuses these values: {error}") from error


def _find_class(name: Any, where: str, recipe: types.ModuleType | None) -> type:
    if not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name)):
        raise ValueError(f'{where}.type is {_brief(name)}; it must look like "package.module:Class"')
    module_name, _, class_name = name.partition(":")
    if module_name == RECIPE and recipe is None:
        raise ValueError(f"{where}.type is {name}, a class of a recipe file; give that recipe file")
    try:
        found = recipe if module_name == RECIPE else importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}.type is {name}, and there is no such class: {error}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{where}.type is {name}; it must be a frozen dataclass, and that is not a dataclass")
    return found


def _name_of(cls: type, where: str) -> str:
    name = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ != RECIPE and (cls.__module__ == "__main__" or _find_or_none(cls) is not cls):
        raise ValueError(
            f"{where} is a {name}, which another process could not import; define the class at the top of a module or "
            "of a recipe file"
        )
    return name


def _find_or_none(cls: type) -> Any:
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found


def _field_names(cls: Any, where: str) -> tuple[str, ...]:
    names = tuple(field.name for field in dataclasses.fields(cls) if field.init)
    if not cls.__dataclass_params__.frozen:
        raise ValueError(f"{where} is a {cls.__qualname__}, which is not frozen; use @dataclass(frozen=True)")
    if "type" in names:
        raise ValueError(f'{where} is a {cls.__qualname__} with a field "type"; that name is taken, rename the field')
    return names


def _hints(cls: type) -> dict[str, Any]:
    # Annotations that cannot be resolved are not checked: names imported for type checkers only, or a recipe's classes
    # after another recipe took the module's name.
    if _find_or_none(cls) is not cls:
        return {}
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {}


def _check_fits(value: Any, hint: Any, where: str) -> None:
    if not _fits(value, hint):
        allowed = hint.__name__ if isinstance(hint, type) else str(hint)
        raise ValueError(f"{where} is {_brief(value)}; allowed is {allowed}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(wanted) == len(value) and all(map(_fits, value, wanted))
    if hint is None:
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def _is_instance_of_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _brief(value: Any) -> str:
    if isinstance(value, dict) and "type" in value:
        return str(value["type"])
    text = json.dumps(value) if isinstance(value, dict | list | str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
