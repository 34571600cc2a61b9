"""Optimizers and learning-rate schedules, from optax, chosen by type."""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon


class Schedule(abc.ABC):
    """How the learning rate moves over a run."""

    @abc.abstractmethod
    def build(self, *, peak: float, steps: int) -> optax.Schedule:
        """The learning rate of each step of a run of `steps` steps."""


def _check_fractions(schedule: Any, *names: str) -> None:
    if schedule.warmup < 0:
        raise ValueError(f"{type(schedule).__name__}.warmup is {schedule.warmup}; it must be at least 0 steps")
    for name in names:
        if not 0 <= getattr(schedule, name) <= 1:
            raise ValueError(f"{type(schedule).__name__}.{name} is {getattr(schedule, name)}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    """Linear warm-up to the peak, then half a cosine. Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983."""

    warmup: int = 50
    """Steps of warm-up; at most a fifth of the run."""
    final: float = 0.05
    """Last learning rate as a fraction of the peak."""

    def __post_init__(self):
        _check_fractions(self, "final")

    def build(self, *, peak: float, steps: int) -> optax.Schedule:
        warmup = min(self.warmup, max(1, steps // 5))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), self.final * peak)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau at the peak, a linear decay. Hu et al. 2024, https://arxiv.org/abs/2404.06395."""

    warmup: int = 50
    """Steps of warm-up; at most a fifth of the run."""
    decay: float = 0.2
    """Last share of the run in which the learning rate falls."""
    final: float = 0.0
    """Last learning rate as a fraction of the peak."""

    def __post_init__(self):
        _check_fractions(self, "decay", "final")

    def build(self, *, peak: float, steps: int) -> optax.Schedule:
        warmup = min(self.warmup, max(1, steps // 5))
        falling = min(max(1, round(self.decay * steps)), max(1, steps - warmup))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, self.final * peak, falling),
            ],
            [warmup, max(warmup, steps - falling)],
        )


class TrainingRule(abc.ABC):
    """What a training step needs of an optimizer, or of a composition of optimizers."""

    @abc.abstractmethod
    def build(self, params: nnx.State, *, steps: int) -> optax.GradientTransformation:
        """The transformation of gradients into updates. `params` may be abstract; its variables carry logical axes."""

    @abc.abstractmethod
    def rate(self, *, steps: int) -> optax.Schedule:
        """The learning rate of each step of a run of `steps` steps."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(TrainingRule):
    """What every optimizer has: a peak learning rate, a schedule, weight decay and clipping."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Schedule = WarmupCosine()
    """How the learning rate moves."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norm scales) are not decayed."""
    clip: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; it must be at least 0")

    def build(self, params: nnx.State, *, steps: int) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.clip), self.update_rule(params, self.rate(steps=steps)))

    def rate(self, *, steps: int) -> optax.Schedule:
        return self.schedule.build(peak=self.learning_rate, steps=steps)

    @abc.abstractmethod
    def update_rule(self, params: nnx.State, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The rule after clipping."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay. Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""

    def update_rule(self, params: nnx.State, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(schedule, self.beta1, self.beta2, weight_decay=self.weight_decay, mask=_is_matrix(params))


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices inside layers, NAdam for the rest (embedding, head, router, norms).

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; updates are scaled to AdamW's size as in
    Liu et al. 2025, https://arxiv.org/abs/2502.16982. Layers and experts are orthogonalised each on its own.
    Weight decay acts on these matrices alone. NAdam (Adam with Nesterov momentum) is what optax pairs Muon with.
    """

    beta: float = 0.95
    """Decay of the momentum."""

    def update_rule(self, params: nnx.State, schedule: optax.Schedule) -> optax.GradientTransformation:
        return muon(
            schedule,
            beta=self.beta,
            weight_decay=self.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions(params),
        )


def _map_variables(change, params: nnx.State) -> nnx.State:
    return jax.tree.map(
        lambda variable: variable.replace(change(variable)), params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata().get("axes") or (None,) * variable.get_value().ndim


def _is_matrix(params: nnx.State) -> nnx.State:
    """True where a variable has two dimensions or more beside layers and experts."""
    return _map_variables(lambda v: sum(axis not in ("layers", "expert") for axis in _axes(v)) >= 2, params)


def _muon_dimensions(params: nnx.State) -> nnx.State:
    """Which dimensions of each weight are summed over and which come out, read from its logical axes.

    The width ("embed") is one side of the matrix, everything else but layers and experts the other.
    """

    def dimensions(variable: nnx.Variable) -> MuonDimensionNumbers | None:
        axes = _axes(variable)
        if "embed" not in axes or not {"mlp", "heads", "kv_heads"} & set(axes):
            return None
        embed = (axes.index("embed"),)
        other = tuple(i for i, axis in enumerate(axes) if axis not in ("layers", "expert", "embed"))
        return MuonDimensionNumbers(embed, other) if embed < other else MuonDimensionNumbers(other, embed)

    return _map_variables(dimensions, params)
