"""Thresholds by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Constant, Decaying, NeverExit, PerExit

EXITS, POSITIONS = jnp.arange(3, dtype=jnp.int32), jnp.asarray([0, 5, 10], jnp.int32)


def test_values_of_each_kind():
    cases = {
        NeverExit(): [np.inf] * 3,
        Constant(threshold=0.25): [0.25] * 3,
        PerExit(thresholds=(0.5, math.inf)): [0.5, np.inf, 0],
        # 0.9 * 0.5 + 0.1 * exp(-4 t / 10)
        Decaying(threshold=0.5, length=10): [0.55, 0.45 + 0.1 * math.exp(-2), 0.45 + 0.1 * math.exp(-4)],
    }
    for thresholds, expected in cases.items():
        np.testing.assert_allclose(thresholds.at(EXITS, POSITIONS), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_its_range_is_refused(value):
    for make in (lambda: Constant(threshold=value), lambda: PerExit(thresholds=(0.5, value))):
        with pytest.raises(ValueError, match="it must be 0 to 1"):
            make()
    with pytest.raises(ValueError, match=r"Decaying.length is 0"):
        Decaying(threshold=0.5, length=0)
    with pytest.raises(ValueError, match=r"PerExit.thresholds is \(\)"):
        PerExit(thresholds=())
