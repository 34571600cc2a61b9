"""Compiles for chips that are not here. Where their compilers are not installed, these tests are skipped and say so."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.aot)
        for needed in ("libtpu", "jax_cuda13_plugin"):
            if importlib.util.find_spec(needed) is None:
                item.add_marker(pytest.mark.skip(reason=f"{needed} is not installed: make test-aot"))
