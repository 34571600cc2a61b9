"""Tiles that were measured: a small table for each kind of device, in `tuned/`, as `dynamoe bench --tune` writes it.

Where a table has no row for a pass, or a kind of device no table, a kernel's own rule stands. Rows are found by powers
of two: what suits 8,192 rows suits 7,000. Letters: M rows, D inner width, F output width, E groups.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .passes import Pass

FOLDER = Path(__file__).with_name("tuned")
Tiles = TypeVar("Tiles", bound=tuple)


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a row of a table is found by."""

    implementation: str
    rows: int
    """A power of two, the least that holds them."""
    depth: int
    columns: int
    groups: int
    numbers: str
    transposed: bool
    outer: bool

    @classmethod
    def of(cls, implementation: str, work: Pass) -> "Key":
        return cls(
            implementation=implementation,
            rows=1 << (work.rows - 1).bit_length(),
            depth=work.depth,
            columns=work.columns,
            groups=work.groups,
            numbers=work.numbers,
            transposed=work.transposed,
            outer=work.outer,
        )


def tuned_tiles(key: Key, device_kind: str, tiles: type[Tiles], folder: Path = FOLDER) -> Tiles | None:
    """What the table of this kind of device says, as `tiles`; None: nothing."""
    found = _table(table_file(device_kind, folder)).get(key)
    try:
        return None if found is None else tiles(**found)
    except TypeError as error:
        raise ValueError(f"{table_file(device_kind, folder)} has other tiles than {tiles.__name__}: {error}") from error


def table_file(device_kind: str, folder: Path = FOLDER) -> Path:
    """As "nvidia_h200.json"."""
    return folder / f"{re.sub('[^a-z0-9]+', '_', device_kind.lower()).strip('_') or 'unknown'}.json"


def write_rows(file: Path, rows: Mapping[Key, Mapping[str, int]], versions: Mapping[str, str]) -> None:
    """Add rows to a table, in the place of those with their keys. The file is whole or as it was, never half. Of two
    processes that write at once, the rows of one are lost.

    Raises:
        ValueError: the file that is there is no such table.
    """
    all_rows = {**_table.__wrapped__(file), **rows}
    entries = [{**vars(key), "tiles": dict(tiles)} for key, tiles in all_rows.items()]
    text = json.dumps({"versions": dict(versions), "rows": sorted(entries, key=str)}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial{os.getpid()}")
    partial.write_text(text + "\n")
    os.replace(partial, file)
    _table.cache_clear()


@functools.cache
def _table(file: Path) -> dict[Key, dict[str, int]]:
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text())["rows"]
        return {Key(**{name: value for name, value in row.items() if name != "tiles"}): row["tiles"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no table of tiles: {error}") from error
