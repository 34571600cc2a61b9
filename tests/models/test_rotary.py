"""Rotary scalings by hand. tests/models/checkpoints holds them to transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models.rotary import DynamicNTK, LinearScaling, Llama3Scaling, Yarn, rotate

POSITIONS = jnp.array([[0, 1, 2], [0, 30, 31]])


def frequencies(scaling, theta, width):
    return np.asarray(scaling.frequencies(theta, width, POSITIONS))


def test_linear_scaling_divides_all_frequencies():
    np.testing.assert_allclose(frequencies(LinearScaling(factor=4.0), 100.0, 4), [[1 / 4, 1 / 40]], rtol=1e-6)


def test_dynamic_scaling_grows_with_each_rows_own_length():
    # Row 0 is 3 tokens long, below 16: nothing changes. Row 1 has 32: theta becomes 100 * (2 * 32 / 16 - 1)^(4 / 2).
    found = frequencies(DynamicNTK(factor=2.0, trained=16), 100.0, 4)
    np.testing.assert_allclose(found, [[1.0, 1 / 10], [1.0, 1 / 30]], rtol=1e-6)


def test_llama3_keeps_fast_pairs_divides_slow_ones_and_mixes_between():
    # theta^(-2i/6) for theta = 8^3: 1, 1/8, 1/64. In 16 pi tokens they turn 8, 1 and 1/8 times; kept share of the
    # middle one with low 0.5 and high 4: (1 - 0.5) / 3.5 = 1/7, so it is 1/8 * (1/7 + 6/7 / 8).
    scaling = Llama3Scaling(factor=8.0, trained=50, low=0.5, high=4.0)
    turns = 50 / (16 * np.pi)
    share = (turns - 0.5) / 3.5
    expected = [[1.0, (share + (1 - share) / 8) / 8, 1 / 512]]
    np.testing.assert_allclose(frequencies(scaling, 512.0, 6), expected, rtol=1e-5)


def test_yarn_keeps_the_first_pairs_divides_the_last_and_sharpens():
    scaling = Yarn(factor=10.0, trained=1000, fast=32.0, slow=1.0)
    found = frequencies(scaling, 10_000.0, 32)[0]
    plain = 10_000.0 ** -(np.arange(16) / 16)
    # Pairs that turn 32 times and once in 1000 tokens: 32 ln(1000 / (2 pi n)) / (2 ln 10000) = 2.79 and 8.81.
    np.testing.assert_allclose(found[:3], plain[:3], rtol=1e-6)
    np.testing.assert_allclose(found[9:], plain[9:] / 10, rtol=1e-6)
    np.testing.assert_allclose(found[5], plain[5] * (1 - 3 / 7 + 3 / 7 / 10), rtol=1e-6)
    np.testing.assert_allclose(scaling.magnitude, 0.1 * np.log(10) + 1)
    x = jnp.ones((2, 3, 1, 32))
    turned = rotate(x, POSITIONS, 10_000.0, scaling)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), scaling.magnitude * 32**0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(factor=0.5), r"LinearScaling\.factor is 0\.5; it must be at least 1"),
        (lambda: DynamicNTK(factor=2.0, trained=0), r"DynamicNTK\.trained is 0; it must be at least 1"),
        (lambda: Llama3Scaling(factor=2.0, trained=8, low=4.0, high=4.0), r"low is 4\.0 and high 4\.0"),
        (lambda: Yarn(factor=2.0, trained=8, fast=1.0), r"Yarn\.slow is 1\.0 and fast 1\.0"),
        (lambda: Yarn(factor=2.0, trained=8, attention=0.0), r"Yarn\.attention is 0\.0"),
    ],
)
def test_a_bad_scaling_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
