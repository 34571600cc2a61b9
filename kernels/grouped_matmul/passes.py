"""What a kernel of a grouped matmul has to do, as far as the choice of its tiles goes.

Letters: M rows, D inner width, F output width, E groups.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a kernel does: [rows, depth] times a [depth, columns] of each of the groups, or, for dw, their sums."""

    rows: int
    depth: int
    columns: int
    groups: int
    bits: int
    """Of an element of x."""
    matrix_bits: int
    """Of an element of w as it is stored."""
    transposed: bool = False
    """The matrices are read transposed, as dx reads them."""
    outer: bool = False
    """The pass is dw: it sums over rows and writes a [depth, columns] for each group."""
    depth_unit: int = 1
    column_unit: int = 1
    """A tile's depth and columns are multiples of these, or whole: packed matrices cannot be cut anywhere."""
    deepest: int | None = None
    """The largest depth of a tile; None: any."""
    widest: int | None = None
    """The largest number of its columns; None: any."""

    @property
    def packed(self) -> bool:
        return self.matrix_bits < self.bits
