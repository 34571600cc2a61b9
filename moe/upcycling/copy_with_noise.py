"""Drop-upcycling: copies of the dense network, in each of which a random share of the hidden units is drawn anew.

Nakamura et al. 2025, "Drop-Upcycling", https://arxiv.org/abs/2502.19261: for every expert floor(ratio * F) hidden units
are chosen; their columns of gate and up and their rows of down are drawn from a normal distribution, with the mean and
the standard deviation that these very weights had. Experts that begin different specialise sooner; the price is that
the function is not kept: the model begins worse than the dense one.

Differs from the paper: the experts' output has a scale, as in `Copy`; with renormalised weights it is 1.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..layer import MoE
from .technique import DenseWeights, ExpertWeights, Upcycling, check_scale, output_scale


@dataclass(frozen=True, kw_only=True)
class CopyWithNoise(Upcycling):
    """Copies with a share of the hidden units drawn anew in each expert (drop-upcycling); the function is not kept."""

    ratio: float = 0.5
    """Share of each expert's hidden units that is drawn anew."""
    scale: float | None = None
    """Factor of the experts' output. None: the one by which copies without noise would keep the function."""

    def __post_init__(self):
        check_scale(self, self.scale)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"CopyWithNoise.ratio is {self.ratio}; it must be from 0 to 1")

    @property
    def keeps_function(self) -> bool:
        return False

    def __call__(
        self, dense: DenseWeights, gate: Float[Array, "D E"] | None, *, mixture: MoE, key: jax.Array
    ) -> tuple[ExpertWeights, Float[Array, "D E"] | None]:
        dense = dense._replace(down=dense.down * output_scale(self.scale, mixture))
        make = functools.partial(_with_noise, dense, count=int(self.ratio * dense.up.shape[1]))
        return jax.vmap(make)(jax.random.split(key, mixture.experts)), gate


def _with_noise(dense: DenseWeights, key: jax.Array, *, count: int) -> ExpertWeights:
    """One expert, in which `count` hidden units are drawn anew."""
    choice, gate, up, down = jax.random.split(key, 4)
    chosen = jax.random.permutation(choice, dense.up.shape[1]) < count
    return ExpertWeights(
        None if dense.gate is None else _redrawn(dense.gate, chosen[None, :], gate),
        _redrawn(dense.up, chosen[None, :], up),
        _redrawn(dense.down, chosen[:, None], down),
    )


def _redrawn(weight: Float[Array, "I O"], chosen: Bool[Array, "..."], key: jax.Array) -> Float[Array, "I O"]:
    """The weight with its chosen entries drawn from their own mean and standard deviation."""
    mask = jnp.broadcast_to(chosen, weight.shape)
    number = jnp.maximum(mask.sum(), 1).astype(weight.dtype)
    mean = jnp.where(mask, weight, 0).sum() / number
    deviation = jnp.sqrt(jnp.where(mask, jnp.square(weight - mean), 0).sum() / number)
    return jnp.where(mask, mean + deviation * jax.random.normal(key, weight.shape, weight.dtype), weight)
