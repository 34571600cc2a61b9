"""Copies of turned views against NumPy's own."""

import ml_dtypes
import numpy as np
import pytest

from dynamoe.models.checkpoints.mapping import View, interleaved, linear
from dynamoe.models.checkpoints.turning import contiguous

VIEWS = {
    "as it is": View((300, 260), (0, 1)),
    "turned": View((300, 260), (1, 0)),
    "heads": View((6, 50, 260), (2, 0, 1)),
    "a part of heads": View((6, 50, 260), (2, 0, 1), (1, 8, 50, 2)),
    "experts": View((3, 100, 260), (0, 2, 1)),
    "every second row of experts": View((3, 100, 260), (0, 2, 1), (1, 1, 100, 2)),
    "a vector": View((78_000,), (0,)),
    "one row": View((1, 78_000), (1, 0)),
}


@pytest.mark.parametrize(
    "kinds", [("bfloat16", "float32"), ("float32", "float32"), ("float32", "bfloat16"), ("uint8",) * 2]
)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_copy_is_what_numpy_makes_of_the_view(view, kinds):
    source, target = (np.dtype(getattr(ml_dtypes, kind, None) or kind) for kind in kinds)
    array = np.random.default_rng(0).integers(0, 200, 78_000).astype(source)
    seen = view(array)
    found = contiguous(seen, target)
    assert found.shape == view.shape and found.flags.c_contiguous and found.ctypes.data % 64 == 0
    np.testing.assert_array_equal(found, seen.astype(target))


def test_views_write_what_they_read():
    for tensor in (linear("w", "x", (4,), (3, 2)), interleaved("w", "x", (5,), 3, 4), interleaved("b", "x", (), 3, 4)):
        array = np.arange(np.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
        parts = [np.array(piece.view(array)) for piece in tensor.pieces]
        back = np.full_like(array, -1)
        for piece, part in zip(tensor.pieces, parts, strict=True):
            piece.view(back)[...] = part
            assert part.shape == piece.view.shape
        np.testing.assert_array_equal(back, array)
