"""Optional packages, imported where they are used."""

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        ImportError: it is not installed; the message says what installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f'the package {module!r} is needed here and cannot be imported ({error}): pip install "dynamoe[data]"'
        raise ImportError(message) from error
