"""Text files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(file: Path, text: str) -> None:
    """Writes a text file whole or not at all, also when the machine stops."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself must reach the disk
    os.close(folder)


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: it holds no JSON; the message names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: it is no JSON, the file is damaged: {error}") from error
