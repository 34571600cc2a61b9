"""Which collectives a compiled program runs, with their bytes, mesh axes and how often, read from its HLO text.

The text names groups of devices in three ways: lists `{{0,1},{2,3}}`, an iota `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`, and
axes of a mesh of the compiler's own, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`. A loop's count stands in its
`known_trip_count` (GPU), or is the constant that its condition compares with (TPU).

A TPU's text shows two kinds in another guise. One collective that runs beside other work stands in several fusions, its
start, each piece of that work and its end, all with one `chain_id`: it is one. And a reduce-scatter stands as an
all-reduce and a slice of its result in a computation called `all-reduce-scatter`.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KINDS = [
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SCATTERED = "all-reduce-scatter"


class Collective(NamedTuple):
    kind: str
    bytes: int
    """Of its result on one device, once; of a ragged all-to-all what goes in where that is less: one of the two is a
    buffer with room for more."""
    axes: tuple[str, ...] | None
    """Mesh axes that it runs over; None: they could not be told."""
    times: int | None
    """None: as often as a loop runs whose length the text does not say."""


def read_collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Equal ones are one entry, in the order of the text.

    Args:
        text: `compiled.as_text()`.
        mesh: sizes of the mesh axes by name, in order; the program's devices are the mesh's.
    """
    bodies = _computations(text)
    counts = _counts(bodies)
    found: Counter[tuple[str, int, tuple[str, ...] | None]] = Counter()
    unknown, chains = set(), set()
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or name not in counts:
                continue
            if chain := _CHAIN.search(line):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            shape, kind, start = match.groups()
            size = _bytes(shape, kind, bool(start))
            if kind == "ragged-all-to-all":
                size = min(size, _operand_bytes(line, lines) or size)
            if name.startswith(_SCATTERED) and kind == "all-reduce":
                kind, size = "reduce-scatter", size // _group_size(line)
            key = kind, size, _axes(line, mesh)
            if counts[name] is None:
                unknown.add(key)
            found[key] += counts[name] or 0
    return [Collective(*key, None if key in unknown else times) for key, times in found.items()]


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by name; the entry's is ""."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies.setdefault("" if line.startswith("ENTRY") else match[1], [])
        else:
            lines.append(line)
    return bodies


def _counts(bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation that is reached runs, of branches each."""
    counts: dict[str, int | None] = {}

    def visit(name: str, times: int | None) -> None:
        before = counts.get(name, 0)
        counts[name] = None if before is None or times is None else before + times
        for line in bodies.get(name, ()):
            if match := _WHILE.search(line):
                turns = _turns(line, bodies.get(match[1], []))
                visit(match[2], None if times is None or turns is None else times * turns)
            else:
                called = _CALLED.findall(line)
                for names in _BRANCHES.findall(line):
                    called += re.findall(r"[\w.\-]+", names)
                for other in called:
                    visit(other, times)

    visit("", 1)
    return counts


def _turns(loop: str, condition: list[str]) -> int | None:
    if match := re.search(r"known_trip_count[^\d}]*(\d+)", loop):
        return int(match[1])
    constants = [int(n) for line in condition for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    counts_up = any("direction=LT" in line for line in condition)
    return constants[0] if len(constants) == 1 and counts_up else None


def _bytes(shape: str, kind: str, start: bool) -> int:
    if start and shape.startswith("(") and kind != "all-reduce":
        shape = _elements(shape)[1]  # beside what goes in
    return _size(shape)


def _size(shape: str) -> int:
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(dtype) // 8
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))
    )


def _operand_bytes(line: str, lines: list[str]) -> int | None:
    """Of an instruction's first operand, by its definition among the lines of the same computation."""
    operand = re.search(r"-all-to-all(?:-start)?\((?:[^%()]*)%?([\w.\-]+)", line)
    if operand is None:
        return None
    defined = re.compile(rf"^\s*(?:ROOT )?%?{re.escape(operand[1])} = (\(.*?\)|\S+) ")
    return next((_size(match[1]) for match in map(defined.match, lines) if match), None)


def _elements(tuple_shape: str) -> list[str]:
    depth, parts = 0, [""]
    for letter in tuple_shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bits(dtype: str) -> int:
    match = _BITS.search(dtype)
    return int(match[0]) if match else 8


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    devices = np.arange(math.prod(mesh.values())).reshape(*mesh.values())
    wide = [axis for axis, size in mesh.items() if size > 1]
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        places = {int(device): place for place, device in np.ndenumerate(devices)}
        pairs = [[places[int(device)] for device in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", match[1])]
        names = list(mesh)
        return tuple(names[i] for i in range(len(names)) if any(source[i] != target[i] for source, target in pairs))
    groups = _groups(line)
    for count in range(len(wide) + 1):
        for axes in itertools.combinations(wide, count):
            if groups == _groups_along(devices, [list(mesh).index(axis) for axis in axes]):
                return axes
    return None


def _group_size(line: str) -> int:
    """How many devices take part together."""
    return max(map(len, _groups(line) or ({0},)))


def _groups(line: str) -> set[frozenset[int]] | None:
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return {frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])}
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return {frozenset(group) for group in _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()}
    named = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',?\s*)*)\}"
    if match := re.search(named, line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        order = _iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[4])]
        return _groups_along(order.reshape(*sizes.values()), along)
    return None


def _groups_along(devices: np.ndarray, axes: list[int]) -> set[frozenset[int]]:
    last = np.moveaxis(devices, axes, range(-len(axes), 0)) if axes else devices
    width = math.prod(devices.shape[axis] for axis in axes)
    return {frozenset(group) for group in last.reshape(-1, width).tolist()}


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_numbers(transposed)) if transposed else devices


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
