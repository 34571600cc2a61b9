"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from .places import Place, is_remote


def write_atomically(file: Place, text: str) -> None:
    """Writes a text file whole or not at all, also when the machine stops. A store does so by itself."""
    if is_remote(file):
        file.write_bytes(text.encode())
        return
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself must reach the disk
    os.close(folder)


def write_picture(file: Place, data: bytes) -> None:
    """Writes a binary file whole or not at all; it can be drawn again, so it need not survive a stop of the machine."""
    if is_remote(file):
        file.write_bytes(data)
        return
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(file)


def read_text(file: Place) -> str:
    """Reads a UTF-8 text; what is none becomes U+FFFD."""
    return file.read_bytes().decode(errors="replace")


def read_json(file: Place) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: it holds no JSON; the message names the file.
    """
    try:
        return json.loads(file.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{file}: it is no JSON, the file is damaged: {error}") from error
