"""Temperature scaling against a grid, and data whose temperature is known."""

import numpy as np
import pytest

from dynamoe.dynamic import calibration_error, fit_temperature, fit_temperatures


def sampled(temperature: float, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, 5)) * 3
    return logits, (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)


def nats(logits: np.ndarray, labels: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.log(p[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_temperature_is_the_best_of_a_grid(temperature):
    logits, labels = sampled(temperature)
    found = fit_temperature(logits, labels)
    grid = np.linspace(0.3, 4, 3701)
    best = grid[np.argmin([nats(logits / t, labels) for t in grid])]
    assert abs(found.temperature - best) <= 1e-3
    np.testing.assert_allclose(
        [found.nats_before, found.nats_after], [nats(logits, labels), nats(logits / best, labels)], 1e-6
    )


def test_it_finds_the_temperature_that_made_the_labels_and_mends_the_error():
    logits, labels = sampled(2.5, rows=20_000)
    found = fit_temperature(logits, labels)
    assert abs(found.temperature - 2.5) < 0.1
    assert found.error_after < 0.02 < 0.1 < found.error_before


def test_calibration_error_by_hand():
    # Confidences 0.9, 0.9 (one right) and 0.6 (right), two bins: both above a half. |0.4 - 2.4 / 3 + ...|
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    labels = np.array([0, 0, 0])
    np.testing.assert_allclose(calibration_error(probabilities, labels, bins=2), abs(2 / 3 - 0.8))
    np.testing.assert_allclose(calibration_error(probabilities, labels, bins=10), 2 / 3 * 0.4 + 1 / 3 * 0.4)


def test_each_exit_has_its_own():
    logits, labels = sampled(2.0)
    one, other = fit_temperatures(np.stack([logits, logits * 3]), labels)
    np.testing.assert_allclose(other.temperature, 3 * one.temperature, rtol=1e-9)


def test_logits_without_a_best_temperature_are_refused():
    labels = np.arange(4) % 2
    with pytest.raises(ValueError, match="they never err"):
        fit_temperature(np.eye(2)[labels], labels)
    with pytest.raises(ValueError, match="a lower logit goes with the label"):
        fit_temperature(-np.eye(2)[labels], labels)
    with pytest.raises(ValueError, match="must hold finite numbers"):
        fit_temperature(np.full((4, 2), np.nan), labels)
