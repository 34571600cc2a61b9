"""Turned copies against NumPy's."""

import ml_dtypes
import numpy as np
import pytest

from dynamoe.kernels import turned_copy as module
from dynamoe.kernels.turned_copy import turned_copy


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (3, 200)])
@pytest.mark.parametrize(
    ("seen", "target"),
    [
        (np.uint8, np.uint8),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float32),
    ],
)
def test_equals_numpys_copy_to_the_bit(shape, seen, target) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape[::-1]).astype(seen)
    whole = np.zeros((shape[0], shape[1] + 3), target)  # a part of a wider array: its neighbours stay
    assert turned_copy(matrix.T, whole[:, 1:-2])
    np.testing.assert_array_equal(whole[:, 1:-2], matrix.T.astype(target))
    assert not whole[:, 0].any() and not whole[:, -2:].any()


def test_says_where_it_does_nothing(monkeypatch) -> None:
    matrix, target = np.ones((4, 4), np.float16), np.zeros((4, 4), np.float32)
    assert not turned_copy(matrix.T, target) and not target.any()
    monkeypatch.setattr(module, "_library", lambda: None)
    assert not turned_copy(np.ones((4, 4), np.float32).T, target) and not target.any()
