"""What a calibration found, under which conditions it holds, and in words what it promises.

A guarantee is saved beside the model, and `check` refuses to use it for anything but what was calibrated.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .thresholds import Constant, NeverExit, PerExit, Thresholds


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Under what conditions answers are made, in JSON's types. Change one of them, and the risk is another."""

    confidence: dict[str, Any]
    """`Confidence.describe()`, or the deferral rules of a cascade."""
    exits: tuple[int, ...]
    """Layers that run before each exit; of a cascade, the numbers of its models."""
    thresholds: str
    """How what was calibrated becomes a threshold: "constant", "per exit", or the caller's own words for another way,
    "decaying, tau 4, 64 tokens"."""
    keys_values: str
    """What fills the cache of layers that were left out; "none" without a cache."""
    batch: str
    """How rows of a batch leave: "each row", "all rows together", ..."""
    model: str
    """Fingerprint of the weights."""

    def __post_init__(self):
        # As they come back from JSON, so that a saved policy equals the one that was saved.
        object.__setattr__(self, "confidence", _plain("Policy.confidence", self.confidence))
        object.__setattr__(self, "exits", tuple(self.exits))


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """A threshold with its statement."""

    threshold: float | tuple[float, ...] | None
    """Answers that score at least this are given early; of a cascade, one of each model but the last. None: no
    candidate passed, so never, and the answers are the full model's."""
    policy: Policy
    risk: str
    """Name of the loss, "disagreement with the full model"."""
    unit: str
    """What was drawn: "prompts", "images"."""
    delta: float
    """The expected loss is at most this."""
    epsilon: float
    """Chance that it is not, over calibration sets."""
    n: int
    """Units in the calibration set."""
    empirical_risk: float
    """Mean loss of the calibration set at the threshold; 0 where it is None."""
    p_value: float
    """Of the threshold; 0 where it is None."""
    cost: float
    """Mean cost of the calibration set at the threshold, in the unit that it came in; `nan` where it was not told."""
    method: str
    """How the threshold was chosen."""

    def __post_init__(self):
        check_levels(self.delta, self.epsilon)
        if self.n < 1:
            raise ValueError(f"Guarantee.n is {self.n}; it must be at least 1")
        for name in ("empirical_risk", "p_value"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Guarantee.{name} is {getattr(self, name)}; it must be 0 to 1")

    @property
    def statement(self) -> str:
        """One sentence that says what is promised, and two what was found."""
        if self.threshold is None:
            return (
                f"No early answer passed the test at {self.risk} {self.delta:g} with {self.n} {self.unit}: the full "
                f"model always answers, and its {self.risk} is 0 by definition."
            )
        return (
            f"With probability at least {1 - self.epsilon:g} over calibration sets of {self.n} {self.unit}, the "
            f"expected {self.risk} is at most {self.delta:g}, where {self.unit} are drawn as those were. On them it "
            f"was {self.empirical_risk:.4g} at the threshold {self.threshold} (p = {self.p_value:.2g}, {self.method})."
        )

    def check(self, policy: Policy) -> None:
        """Whether this guarantee is about answers made so.

        Raises:
            ValueError: names what differs, the value in use and the calibrated one.
        """
        for field in fields(Policy):
            used, calibrated = getattr(policy, field.name), getattr(self.policy, field.name)
            if used != calibrated:
                raise ValueError(
                    f"policy.{field.name} is {used!r}, but the guarantee was calibrated with {calibrated!r}; use that, "
                    "or calibrate again"
                )

    def thresholds_for(self, policy: Policy) -> Thresholds:
        """The thresholds of exits, once `check` has passed.

        Raises:
            ValueError: as `check`; or the policy's thresholds are neither "constant" nor "per exit", so that only the
                caller can build them.
        """
        self.check(policy)
        if self.threshold is None:
            return NeverExit()
        if policy.thresholds != (known := "per exit" if isinstance(self.threshold, tuple) else "constant"):
            raise ValueError(
                f"policy.thresholds is {policy.thresholds!r}; of {self.threshold} only {known!r} thresholds are made "
                "here: check the policy, and build yours from Guarantee.threshold"
            )
        if isinstance(self.threshold, tuple):
            return PerExit(thresholds=self.threshold)
        return Constant(threshold=self.threshold)

    def to_json(self) -> str:
        """Strict JSON, with the statement in words for who reads the file."""
        record = asdict(self) | {"cost": None if math.isnan(self.cost) else self.cost}
        return json.dumps(record | {"statement": self.statement}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Guarantee":
        """What `to_json` wrote.

        Raises:
            ValueError: it is not, or was changed so that it contradicts itself; says where.
        """
        record = _fields("guarantee", json.loads(text), [*(f.name for f in fields(cls)), "statement"])
        statement = record.pop("statement")
        policy = _fields("guarantee's policy", record["policy"], [field.name for field in fields(Policy)])
        wanted = {"risk": str, "unit": str, "method": str, "delta": float, "epsilon": float, "n": int}
        wanted |= {"empirical_risk": (int, float), "p_value": (int, float), "cost": (int, float, type(None))}
        wanted |= {"threshold": (int, float, list, type(None))}
        _typed("guarantee", record, wanted)
        _typed("policy", policy, {"confidence": dict, "exits": list, "thresholds": str, "keys_values": str})
        _typed("policy", policy, {"batch": str, "model": str})
        policy["exits"] = tuple(policy["exits"])
        cost = math.nan if record["cost"] is None else float(record["cost"])
        if isinstance(record["threshold"], list):
            for threshold in record["threshold"]:
                _typed("guarantee", {"threshold": threshold}, {"threshold": (int, float)})
            record["threshold"] = tuple(record["threshold"])
        guarantee = cls(**record | {"policy": Policy(**policy), "cost": cost})
        if guarantee.statement != statement:
            raise ValueError(
                f"the guarantee's statement is {statement!r}, but its numbers say {guarantee.statement!r}: the file "
                "was changed by hand"
            )
        return guarantee


def check_levels(delta: float, epsilon: float) -> None:
    """
    Raises:
        ValueError: not both lie strictly between 0 and 1.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and below 1")


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}; it must be of JSON's types, with finite numbers") from error


def _fields(what: str, record: Any, names: list[str]) -> dict[str, Any]:
    if not isinstance(record, dict) or set(record) != set(names):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"the {what} has {found}; it must have exactly {sorted(names)}")
    return dict(record)


def _typed(what: str, record: dict[str, Any], types: dict[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            allowed = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{what}.{name} is {record[name]!r}; it must be {allowed}")
