"""The values of a config.json, checked one by one as a family asks for them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NONE_GIVEN: Any = object()


@dataclass(frozen=True)
class Fields:
    """A configuration as published. A value that is null counts as left out.

    Every method returns a field's value, or `default` where the field is left out; without a default it must be there.

    Raises:
        ValueError: the value is of another kind or outside of what is allowed; or it is missing.
    """

    values: Mapping[str, Any]
    name: str = "config.json"

    def integer(self, field: str, default: Any = _NONE_GIVEN, *, least: int = 1) -> Any:
        value = self._get(field, default)
        if value is default:
            return value
        if type(value) is not int or not least <= value < 2**63:
            raise self._wrong(field, value, f"it must be a whole number of at least {least}")
        return value

    def number(self, field: str, default: Any = _NONE_GIVEN) -> Any:
        value = self._get(field, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not abs(value) < 1e300 or not math.isfinite(value):
            raise self._wrong(field, value, "it must be a finite number")
        return float(value)

    def flag(self, field: str, default: Any = _NONE_GIVEN) -> Any:
        value = self._get(field, default)
        if type(value) is not bool:
            raise self._wrong(field, value, "it must be true or false")
        return value

    def word(self, field: str, allowed: tuple[str, ...], default: Any = _NONE_GIVEN) -> str:
        value = self._get(field, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(field, value, f"known are {', '.join(allowed)}")
        return value

    def words(self, field: str, allowed: tuple[str, ...], default: Any = _NONE_GIVEN) -> tuple[str, ...]:
        value = self._get(field, default)
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word in allowed for word in value):
            raise self._wrong(field, value, f"it must be a list of {', '.join(allowed)}")
        return tuple(value)

    def integers(self, field: str, default: Any = _NONE_GIVEN) -> tuple[int, ...]:
        value = self._get(field, default)
        if not isinstance(value, list | tuple) or not all(type(item) is int and item >= 0 for item in value):
            raise self._wrong(field, value, "it must be a list of numbers of 0 or more")
        return tuple(value)

    def object(self, field: str) -> "Fields | None":
        """The fields of an object in a field; None where it is left out."""
        value = self._get(field, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(field, value, "it must be an object")
        return Fields(value, f"{self.name}: {field}")

    def must_be(self, field: str, allowed: Any, default: Any = _NONE_GIVEN) -> None:
        """Refuse every value but one: what the others mean is not built here."""
        value = self._get(field, allowed if default is _NONE_GIVEN else default)
        if type(value) is not type(allowed) or value != allowed:
            raise self._wrong(field, value, f"what is built here needs {allowed!r}")

    def _get(self, field: str, default: Any) -> Any:
        value = self.values.get(field)
        value = default if value is None else value
        if value is _NONE_GIVEN:
            raise ValueError(f"{self.name} has no {field}; it must have one")
        return value

    def _wrong(self, field: str, value: Any, must: str) -> ValueError:
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
        return ValueError(f"{self.name}: {field} is {text[:80]}; {must}")
