"""What the tests of mixtures share."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.extend.core import jaxprs_in_params


def _operations(function: Callable[..., Any], *arguments: Any) -> int:
    def count(jaxpr: Any) -> int:
        return sum(1 + sum(count(inner) for inner in jaxprs_in_params(equation.params)) for equation in jaxpr.eqns)

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.fixture(scope="session")
def operations() -> Callable[..., int]:
    """`operations(function, *arguments)`: how many operations its program has, those of a loop's body counted once."""
    return _operations
