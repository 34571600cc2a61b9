"""Top-k routing, the family of routers that score a token's experts and take the k best.

Shazeer et al. 2017, "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538. What later papers changed
are options that compose: noise, then scores, then a balancing bias, then a limit to groups, then the k best.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..balancing import Balancing
from ..group_limit import GroupLimit
from ..noise import LearnedNoise, Noise, NoisyLogits, chance_of_top_k
from ..routing import Router, Routing, RoutingContext, assignment_counts, check_choices, padding_to_nobody
from ..scores import Scores, Softmax, normalized
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Each token goes to the k experts that score highest, in float32. How published models write their routers:

    Shazeer et al. 2017   TopK(k=4, noise=LearnedNoise())
    Switch Transformer    TopK(k=1, renormalize=False, noise=Jitter(amount=0.01))
    Mixtral               TopK(k=2)
    OLMoE                 TopK(k=8, renormalize=False)
    Qwen3-MoE             TopK(k=8)
    gpt-oss               TopK(k=4, gate_bias=True)
    DeepSeek-V2           TopK(k=6, renormalize=False, scale=16.0, groups=GroupLimit(groups=8, chosen=3, best=1))
    DeepSeek-V3           TopK(k=8, scores=Sigmoid(), scale=2.5, groups=GroupLimit(groups=8, chosen=4),
                               balancing=LossFree(rate=0.001))
    """

    k: int = 2
    """Experts per token."""
    scores: Scores = Softmax()
    """What the logits become: the scores choose and weight the experts."""
    renormalize: bool = True
    """Divide the k weights by their sum (Mixtral, Qwen3-MoE). With k = 1 it must be False (Switch): the weight would be
    a constant 1, and the router would learn from the balance loss alone."""
    scale: float = 1.0
    """Factor on the weights after that (routed_scaling_factor in the published configurations)."""
    noise: Noise | None = None
    """Disturbs the logits in training: `Jitter`, `LearnedNoise` or `Gumbel`."""
    balancing: Balancing | None = None
    """Keeps the loads even without a loss: `LossFree`."""
    groups: GroupLimit | None = None
    """Limits a token to experts of few groups."""
    gate_bias: bool = False
    """Add a learned bias to the logits (gpt-oss)."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK.k is {self.k}; it must be at least 1 expert per token")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"TopK.scale is {self.scale}; it must be above 0 and finite")
        if self.k == 1 and self.renormalize:
            raise ValueError(
                "TopK.renormalize is True with k=1: every weight would be 1 and the task would teach the router "
                "nothing; it must be False"
            )

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def has_chance(self) -> bool:
        return isinstance(self.noise, LearnedNoise) and self.balancing is None and self.groups is None

    @property
    def weight_sum(self) -> float | None:
        return self.scale if self.renormalize else None

    def build(self, *, width: int, experts: int, key: jax.Array) -> "TopKRouter":
        check_choices(self, experts, "k")
        if self.groups is not None:
            self.groups.check(experts=experts, k=self.k)
        return TopKRouter(self, width=width, experts=experts, key=key)


class TopKRouter(nnx.Module):
    """A linear map to expert logits, scores and a top-k. With noise it needs `context.key` in training.

    `logits` and `probs` of the routing are those that weigh the experts, so with the noise of `Jitter` and
    `LearnedNoise`. Its `chance` is filled where the noise is `LearnedNoise` and alone decides.
    """

    def __init__(self, config: TopK, *, width: int, experts: int, key: jax.Array):
        noise, balancing = config.noise, config.balancing
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key, bias=config.gate_bias)
        self.noise = noise and noise.build(width=width, experts=experts, key=jax.random.fold_in(key, 1))
        self.balancing = balancing and balancing.build(experts=experts)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, dict[str, jax.Array] | None]:
        config = self.config
        noisy = self._noisy_logits(x.astype(jnp.float32), context)
        scores, probs = config.scores(noisy.logits)
        selection = scores if noisy.selection is None else config.scores(noisy.selection)[0]
        selection = selection if self.balancing is None else self.balancing.selection(selection)
        selection = selection if config.groups is None else config.groups(selection)
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(selection), config.k)
        weight = jnp.take_along_axis(scores, expert, axis=1)
        weight = config.scale * (normalized(weight) if config.renormalize else weight)
        expert, weight = padding_to_nobody(expert, weight, context.mask, probs.shape[1])
        chance = chance_of_top_k(noisy, config.k) if config.has_chance else None
        routing = Routing(expert.reshape(-1), weight.reshape(-1), None, noisy.logits, probs, chance)
        return routing, self._new_state(routing) if context.training else None

    def _noisy_logits(self, x: Float[Array, "T D"], context: RoutingContext) -> NoisyLogits:
        if self.noise is None:
            return NoisyLogits(self.gate(x))
        if context.training and context.key is None:
            raise ValueError(f"context.key is None; a router with {self.config.noise} needs a PRNG key in training")
        return self.noise(x, self.gate, context.key if context.training else None)

    def _new_state(self, routing: Routing) -> dict[str, jax.Array] | None:
        if self.balancing is None:
            return None
        state = self.balancing.updated(assignment_counts(routing))
        return {f"balancing.{name}": value for name, value in state.items()}
