"""Exits, the losses over them and layer dropout, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import (
    DepthWeighted,
    Exits,
    LayerDropout,
    LayerSkipLoss,
    SelfDistilled,
    divergence,
)

NOW, END = jnp.float32(0.0), jnp.float32(1.0)


def test_depth_weighted_by_hand() -> None:
    weights = DepthWeighted().weights((2, 4, 6, 8), 8, NOW)
    np.testing.assert_allclose(weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_layer_skip_weights_by_hand() -> None:
    # Sums of layer numbers: 0+1 = 1, 0+..+3 = 6, times 0.5; the last layer 8 - 1 + 0.5 * (0+..+6) = 17.5
    weights = LayerSkipLoss(scale=0.5, gradual=False).weights((2, 4, 8), 8, NOW)
    np.testing.assert_allclose(weights, np.array([0.5, 3.0, 17.5]) / 21, rtol=1e-6)


def test_the_gradual_curriculum_begins_with_the_last_and_ends_with_all() -> None:
    loss = LayerSkipLoss(scale=0.5)
    at = lambda progress: np.asarray(loss.weights((2, 4, 6, 8), 8, jnp.float32(progress))) > 0  # noqa: E731
    assert at(0.0).tolist() == [False, False, False, True]
    assert at(0.2).tolist() == [False, False, True, True]
    assert at(0.4).tolist() == [False, True, True, True]
    assert at(0.5).all() and at(1.0).all()
    assert float(loss.weights((2, 4, 8), 8, jnp.float32(0.1)).sum()) == pytest.approx(1)


def test_divergence_is_zero_at_the_teacher_and_teaches_it_nothing() -> None:
    teacher, exit = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[1.0, 0.0, 0.0]])
    assert float(divergence(teacher, teacher)[0]) == pytest.approx(0, abs=1e-6)
    p = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    q = np.exp([1.0, 0.0, 0.0]) / np.exp([1.0, 0.0, 0.0]).sum()
    assert float(divergence(exit, teacher)[0]) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    to_exit, to_teacher = jax.grad(lambda a, b: divergence(a, b).sum(), argnums=(0, 1))(exit, teacher)
    np.testing.assert_allclose(to_exit[0], q - p, atol=1e-6)  # as of a cross-entropy with soft targets
    assert not np.asarray(to_teacher).any()


def test_layer_dropout_grows_with_depth_and_training() -> None:
    dropout = LayerDropout(most=0.2)
    at = lambda layer, progress: float(dropout.probability(layer, 5, jnp.float32(progress)))  # noqa: E731
    assert at(0, 1.0) == 0 and at(4, 1.0) == pytest.approx(0.2) and at(4, 0.0) == 0
    assert at(2, 1.0) == pytest.approx(0.2 * (math.exp(0.5 * math.log(2)) - 1), rel=1e-5)
    kept = dropout.kept(jax.random.key(0), 4000, 4, 5, END)
    assert 1 - float(kept.mean()) == pytest.approx(0.2, abs=0.03)
    whole = LayerDropout(most=0.2, from_scratch=False)
    assert float(whole.probability(4, 5, NOW)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exits(after=()), r"Exits.after is \(\); name one exit at least"),
        (lambda: Exits(after=(0, 2)), r"Exits.after is \(0, 2\); it must ascend from 1 or more, each once"),
        (lambda: Exits(after=(2, 2)), r"Exits.after is \(2, 2\); it must ascend"),
        (
            lambda: Exits(after=(2, 8)).depths(8),
            r"Exits.after is \(2, 8\); with 8 layers exits may follow layers 1 to 7",
        ),
        (lambda: LayerSkipLoss(scale=-1.0), "LayerSkipLoss.scale is -1.0; it must be finite and at least 0"),
        (lambda: SelfDistilled(share=0.0), "SelfDistilled.share is 0.0; it must be above 0 and at most 1"),
        (lambda: LayerDropout(most=1.0), "LayerDropout.most is 1.0; it must be above 0 and below 1"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
