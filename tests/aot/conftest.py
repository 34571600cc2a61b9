"""Compiles for chips that are not here. Their compiler is libtpu's; without it these tests are skipped, and say so."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.aot)
        if importlib.util.find_spec("libtpu") is None:
            item.add_marker(pytest.mark.skip(reason="libtpu is not installed: make test-aot"))
