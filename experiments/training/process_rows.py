"""Which rows of a global batch a process reads: those that its devices hold.

Where the batch is split over fewer parts than there are processes, as with a tensor axis across hosts, several
processes hold, and read, the same rows.
"""

import numpy as np

from ...models import Layout


def process_rows(layout: Layout, batch_size: int) -> np.ndarray:
    """The numbers of the rows that this process's devices hold, ascending.

    Args:
        layout: the mesh and its rules.
        batch_size: B, rows of the global batch.
    """
    pieces = layout.batch(batch_size, 2).addressable_devices_indices_map((batch_size, 1)).values()
    held = np.zeros(batch_size, bool)
    for piece in pieces:
        assert piece is not None
        held[piece[0]] = True
    return held.nonzero()[0]


def global_rows(layout: Layout, rows: int) -> int:
    """The size of the global batch of which this process holds `rows` rows."""
    devices = layout.mesh.size  # a batch that divides over any part of the mesh
    return rows * devices // len(process_rows(layout, devices))
