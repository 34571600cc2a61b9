"""The figure's own tools."""

import numpy as np
import pytest
from scipy import stats

from dynamoe.dynamic.simulated_calibration import SETTINGS, clopper_pearson


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_clopper_pearson_equals_scipy(count):
    expected = stats.binomtest(count, 40).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(clopper_pearson(count, 40), expected, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_losses_have_the_risk_that_is_stated(setting):
    losses = setting.draw(np.random.default_rng(0), 20_000, setting.risk)
    error = 5 * np.sqrt(setting.risk * (1 - setting.risk) / 20_000)
    assert (np.abs(losses.mean(axis=0) - setting.risk) <= error + 1e-12).all()
