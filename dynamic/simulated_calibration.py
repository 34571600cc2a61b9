"""Does the guarantee hold? Learn-then-Test on losses whose risk is known, thousands of times.

    python -m dynamoe.dynamic.simulated_calibration

Written before the numbers: delta = epsilon = 0.05, n = 1,000 units, 101 candidates (21 for shares of tokens), 2,000
draws of calibration sets, the settings below. A draw violates the guarantee where the true risk of the chosen threshold
is above delta. It holds where violations are at most epsilon of the draws; it is not wasteful where the mean true risk
of the choices, never exiting counted as 0, is above half of delta. A larger n brings that closer to delta: the gap
shrinks about as 1 / sqrt(n).

Letters: n units, J candidates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .calibration import count_passed
from .p_values import HoeffdingBentkus, PValue, log_binomial_tails

_GRID = np.linspace(0, 1, 101)
"""How far each candidate goes from the safest to the riskiest."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Losses of a known expectation."""

    name: str
    risk: Float[np.ndarray, " J"]
    """True expected loss of each candidate."""
    draw: Callable[[np.random.Generator, int, Float[np.ndarray, " J"]], Float[np.ndarray, "n J"]]
    """Losses of a fresh calibration set."""
    delta: float = 0.05
    epsilon: float = 0.05
    units: int = 1000


class Simulated(NamedTuple):
    """What the draws gave."""

    violations: float
    """Share of draws whose chosen threshold has a true risk above delta."""
    interval: tuple[float, float]
    """95% Clopper-Pearson interval of that share."""
    mean_risk: float
    """Mean true risk of the choices."""


def simulate(setting: Setting, *, draws: int, seed: int, p_value: PValue | None = None) -> Simulated:
    """Calibrate on so many fresh sets, and hold each choice against its true risk."""
    rng, test = np.random.default_rng(seed), HoeffdingBentkus() if p_value is None else p_value
    chosen = np.zeros(draws)
    for i in range(draws):
        losses = setting.draw(rng, setting.units, setting.risk)
        passed = count_passed(test(losses, setting.delta, setting.epsilon), setting.epsilon)
        chosen[i] = setting.risk[passed - 1] if passed else 0.0
    violations = int((chosen > setting.delta).sum())
    return Simulated(violations / draws, clopper_pearson(violations, draws), float(chosen.mean()))


def clopper_pearson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share: chances under which `count` of n, or further out, is no rarer than (1 - level) / 2."""
    rare = (1 - level) / 2

    def at_most(k: int, chance: float) -> float:
        return math.exp(log_binomial_tails(n, chance)[k])

    low = 0.0 if count == 0 else _root(lambda chance: 1 - at_most(count - 1, chance) > rare)
    high = 1.0 if count == n else _root(lambda chance: at_most(count, chance) <= rare)
    return low, high


def _root(above: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2


def _nested(rng: np.random.Generator, n: int, risk: Float[np.ndarray, " J"]) -> Float[np.ndarray, "n J"]:
    """0 or 1: each unit has a point from which on it is lost, as real losses nearly have."""
    return (rng.uniform(size=(n, 1)) < risk[None]).astype(np.float64)


def _unrelated(rng: np.random.Generator, n: int, risk: Float[np.ndarray, " J"]) -> Float[np.ndarray, "n J"]:
    """0 or 1, each candidate drawn for itself: the hardest for a test of many."""
    return (rng.uniform(size=(n, len(risk))) < risk[None]).astype(np.float64)


def _tokens(rng: np.random.Generator, n: int, risk: Float[np.ndarray, " J"]) -> Float[np.ndarray, "n J"]:
    """Shares of 20 tokens, whose fates are tied by how hard the unit is: uniform between none and twice the mean."""
    hard = rng.uniform(size=(n, 1)) * 2
    return (rng.uniform(size=(n, 20, 1)) < (hard * risk[None])[:, None]).mean(axis=1)


SETTINGS = (
    Setting(name="linear", risk=0.2 * _GRID, draw=_nested),
    Setting(name="late rise", risk=0.5 * _GRID**4, draw=_nested),
    Setting(name="a step to just above delta", risk=np.where(_GRID < 0.5, 0.04 * _GRID / 0.5, 0.0501), draw=_nested),
    Setting(name="unrelated candidates", risk=0.2 * _GRID, draw=_unrelated),
    Setting(name="shares of tokens", risk=0.2 * _GRID[::5], draw=_tokens),
)
"""Shapes of the risk along the candidates, and how a unit's losses at them hang together."""


def main() -> None:
    """Print the figure."""
    print("setting                     units  violations  95% interval     mean risk / delta")
    for setting in SETTINGS:
        found = simulate(setting, draws=2000, seed=1)
        low, high = found.interval
        share = found.mean_risk / setting.delta
        print(f"{setting.name:27} {setting.units:5}  {found.violations:10.4f}  {low:.4f} - {high:.4f}  {share:17.3f}")


if __name__ == "__main__":
    main()
