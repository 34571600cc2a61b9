"""What a compression did to every array: technique, bits, bytes and error, as a table and as JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax

HEADINGS = ("path", "technique", "shape", "bits", "bytes before", "bytes after", "error")
UNTOUCHED = "-"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of one array."""

    path: str
    technique: str | None
    """None: it was left alone."""
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    """With scales and whatever else is kept."""
    error: float
    """||W - W'|| / ||W||, W' being the numbers that the compressed array stands for; NaN where W holds NaN."""

    @property
    def bits_per_element(self) -> float:
        """Of what is kept."""
        return 8 * self.bytes_after / max(math.prod(self.shape), 1)


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """Every array of a model, those left alone included."""

    entries: tuple[Coverage, ...]

    @property
    def bytes_before(self) -> int:
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.entries)

    @property
    def compressed(self) -> tuple[Coverage, ...]:
        """Those that a technique was applied to."""
        return tuple(entry for entry in self.entries if entry.technique is not None)

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells below `HEADINGS`, the last row being the totals."""
        rows = [
            (
                entry.path,
                entry.technique or UNTOUCHED,
                " x ".join(map(str, entry.shape)),
                f"{entry.bits_per_element:.2f}",
                f"{entry.bytes_before:,}",
                f"{entry.bytes_after:,}",
                UNTOUCHED if entry.technique is None else f"{entry.error:.4f}",
            )
            for entry in self.entries
        ]
        elements = sum(math.prod(entry.shape) for entry in self.entries)
        share = f"{len(self.compressed)} of {len(self.entries)} arrays"
        bits = f"{8 * self.bytes_after / max(elements, 1):.2f}"
        total = ("total", share, f"{elements:,}", bits, f"{self.bytes_before:,}", f"{self.bytes_after:,}", "")
        return [*rows, total]

    def __str__(self) -> str:
        """A table of plain text."""
        lines = [HEADINGS, *self.rows()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(HEADINGS))]
        aligned = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in aligned)

    def to_json(self) -> dict[str, Any]:
        """Plain values; an error that is not a number is None."""
        arrays = [
            asdict(entry)
            | {
                "shape": list(entry.shape),
                "bits_per_element": entry.bits_per_element,
                "error": entry.error if math.isfinite(entry.error) else None,
            }
            for entry in self.entries
        ]
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "arrays": arrays}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
