"""Fine-grained upcycling: the dense network cut into shards along its hidden width, with routers of virtual groups.

He et al. 2024, "Upcycling Large Language Models into Mixture of Experts", https://arxiv.org/abs/2410.07524. The hidden
units fall into G shards, whose outputs sum to the dense network's; with E experts there are E / G copies of each.
Expert c * G + s is shard s of copy c, and the experts of one copy, a virtual group, share one router column. Their
scores are equal, so a top-k with k a multiple of G takes whole groups: every shard is there k / G times.

The weights within a group are equal too. If a token's weights sum to w, each shard counts w / G in total, and a factor
of G / w keeps the function: G for renormalised weights ("top-k then softmax" in the paper). For softmax probabilities
that are not renormalised w is k / E only while all experts are equally probable; the factor is then the paper's,
G * E / k (with its letters E * G^2 / T, for it counts E copies). As it holds nowhere else, we ask for it by `scale`.

Differs from the paper's code, which gives each of the three matrices the cube root of the factor: silu(a x) is not
a silu(x), so the function would not be kept. Here the down projection takes it whole.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..layer import MoE
from .technique import DenseWeights, ExpertWeights, Upcycling, check_scale, gate_or_refuse, output_scale


@dataclass(frozen=True, kw_only=True)
class GranularSplit(Upcycling):
    """Fine-grained experts: shards of the dense network, routed in virtual groups; the function is kept."""

    shards: int = 2
    """How many parts G the hidden width is cut into; it divides the experts and the experts per token."""
    scale: float | None = None
    """Factor of the experts' output. None: the one that keeps the function, where the router has one."""

    def __post_init__(self):
        check_scale(self, self.scale)
        if self.shards < 1:
            raise ValueError(f"GranularSplit.shards is {self.shards}; it must be at least 1")

    @property
    def keeps_function(self) -> bool:
        return self.scale is None

    def __call__(
        self, dense: DenseWeights, gate: Float[Array, "D E"] | None, *, mixture: MoE, key: jax.Array
    ) -> tuple[ExpertWeights, Float[Array, "D E"] | None]:
        self._check(mixture, hidden=dense.up.shape[1])
        gate = gate_or_refuse(gate, self, mixture)
        down = dense.down * output_scale(self.scale, mixture, parts=float(self.shards))
        copies = mixture.experts // self.shards
        experts = ExpertWeights(
            None if dense.gate is None else self._inward(dense.gate, copies),
            self._inward(dense.up, copies),
            jnp.tile(down.reshape(self.shards, -1, down.shape[1]), (copies, 1, 1)),
        )
        return experts, jnp.repeat(gate[:, :copies], self.shards, axis=1)

    def _inward(self, weight: Float[Array, "D F"], copies: int) -> Float[Array, "E D I"]:
        shards = weight.reshape(weight.shape[0], self.shards, -1).swapaxes(0, 1)
        return jnp.tile(shards, (copies, 1, 1))

    def _check(self, mixture: MoE, *, hidden: int) -> None:
        sizes = {
            "the dense network's hidden width": hidden,
            "MoE.experts": mixture.experts,
            "the router's experts per token": mixture.router.experts_per_token,
        }
        for name, size in sizes.items():
            if size % self.shards:
                raise ValueError(
                    f"GranularSplit.shards is {self.shards} and {name} {size:g}; it must be a multiple of the shards"
                )
