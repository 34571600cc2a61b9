"""Losses of calibration units, by hand."""

import numpy as np
import pytest

from dynamoe.dynamic import disagreement, loss_of_quality, wrong_only_early


def test_disagreement_is_the_share_of_differing_tokens_that_count():
    early, full = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[1, 2, 9, 9], [5, 6, 7, 8]])
    np.testing.assert_allclose(disagreement(early, full), [0.5, 0])
    counted = np.array([[True, True, True, False], [True, False, False, False]])
    np.testing.assert_allclose(disagreement(early, full, counted), [1 / 3, 0])
    with pytest.raises(ValueError, match="counted has no token of answer 1"):
        disagreement(early, full, counted & (np.arange(2) == 0)[:, None])


def test_loss_of_quality_counts_what_is_worse_up_to_1():
    early, full = np.array([-2.0, -2.0, -9.0]), np.array([-1.5, -3.0, -1.0])
    np.testing.assert_allclose(loss_of_quality(early, full, scale=2.0), [0.25, 0, 1])
    with pytest.raises(ValueError, match="scale is 0.0; it must be above 0"):
        loss_of_quality(early, full, scale=0.0)
    with pytest.raises(ValueError, match="not finite"):
        loss_of_quality(early * np.nan, full, scale=1.0)


def test_wrong_only_early_forgives_what_the_full_model_misses_too():
    early, full, labels = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])
    np.testing.assert_array_equal(wrong_only_early(early, full, labels), [0, 1, 0, 0])
