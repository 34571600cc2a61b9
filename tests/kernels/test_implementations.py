"""How an op chooses among its implementations."""

from collections.abc import Callable

import jax
import pytest

from dynamoe.kernels.implementations import OTHER, run_implementation


def refuse(x: int) -> int:
    raise NotImplementedError(f"x is {x}; allowed is 0")


def fail(x: int) -> int:
    raise ValueError("the caller's mistake")


TABLE: dict[str, Callable[[int], int]] = {"double": lambda x: 2 * x, "triple": lambda x: 3 * x, "picky": refuse}
PREFERRED = {"cpu": ("picky", "triple", "double"), OTHER: ("double",)}


def test_a_name_runs_exactly_that_one():
    assert run_implementation("double", TABLE, PREFERRED, 5) == 10
    assert run_implementation("triple", TABLE, PREFERRED, 5) == 15


def test_a_named_implementation_that_refuses_does_not_fall_back():
    with pytest.raises(NotImplementedError, match="^x is 5; allowed is 0$"):
        run_implementation("picky", TABLE, PREFERRED, 5)


def test_an_unknown_name_says_what_came_and_what_is_allowed():
    with pytest.raises(
        ValueError, match="implementation is 'quadruple'; allowed are None, 'double', 'triple', 'picky'"
    ):
        run_implementation("quadruple", TABLE, PREFERRED, 5)


def test_without_a_name_the_first_that_accepts_runs():
    assert run_implementation(None, TABLE, PREFERRED, 5) == 15


def test_a_platform_without_an_entry_takes_that_of_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    assert run_implementation(None, TABLE, PREFERRED, 5) == 10


def test_where_all_refuse_the_error_says_why_each_did():
    with pytest.raises(NotImplementedError, match="for cpu accepts these arguments. picky: x is 5; allowed is 0"):
        run_implementation(None, TABLE, {OTHER: ("picky",)}, 5)


def test_the_callers_mistake_is_told_at_once():
    with pytest.raises(ValueError, match="the caller's mistake"):
        run_implementation(None, {**TABLE, "strict": fail}, {OTHER: ("strict", "double")}, 5)
