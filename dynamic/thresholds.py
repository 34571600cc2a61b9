"""At which confidence a token leaves. Letters: N exits."""

import abc
import math
from dataclasses import dataclass


class Threshold(abc.ABC):
    """Gives the lowest confidence at which a token may leave."""

    @abc.abstractmethod
    def at(self, exit: int, drawn: int) -> float:
        """At an exit, counted from 0, for a request that has drawn so many tokens."""

    @property
    def exits(self) -> int | None:
        """How many exits it is made for, the last not counted; None: any number."""
        return None

    def check_exits(self, exits: int) -> None:
        """Refuse a model with so many exits before the last, if it is made for another number."""
        if self.exits not in (None, exits):
            raise ValueError(
                f"threshold is {self}, made for {self.exits} exits; the model has {exits} before the last layer"
            )


@dataclass(frozen=True, kw_only=True)
class Constant(Threshold):
    """The same for all exits and tokens."""

    value: float
    """0 to 1."""

    def __post_init__(self):
        if not 0 <= self.value <= 1:
            raise ValueError(f"Constant.value is {self.value}; it must be from 0 to 1")

    def at(self, exit: int, drawn: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class PerExit(Threshold):
    """One for each exit before the last."""

    values: tuple[float, ...]
    """0 to 1 each, or infinity: nobody leaves there."""

    def __post_init__(self):
        if wrong := [value for value in self.values if not (0 <= value <= 1 or value == math.inf)]:
            raise ValueError(f"PerExit.values holds {wrong[0]}; each must be from 0 to 1, or infinity")

    def at(self, exit: int, drawn: int) -> float:
        return self.values[exit]

    @property
    def exits(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Decaying(Threshold):
    """Careful at first: an early mistake is seen by all later tokens. CALM, Schuster et al. 2022,
    https://arxiv.org/abs/2207.07061, eq. 5: clip(0.9 value + 0.1 e^(-temperature t / length))."""

    value: float
    """Lambda, 0 to 1."""
    temperature: float = 4.0
    """Tau, how fast it falls."""
    length: int = 256
    """N, the longest answer, in tokens."""

    def __post_init__(self):
        if not 0 <= self.value <= 1:
            raise ValueError(f"Decaying.value is {self.value}; it must be from 0 to 1")
        if not self.temperature >= 0:
            raise ValueError(f"Decaying.temperature is {self.temperature}; it must be at least 0")
        if self.length < 1:
            raise ValueError(f"Decaying.length is {self.length}; it must be at least 1")

    def at(self, exit: int, drawn: int) -> float:
        return min(1.0, max(0.0, 0.9 * self.value + 0.1 * math.exp(-self.temperature * drawn / self.length)))
