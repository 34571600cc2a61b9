"""Scopes: the tokens that a loss takes together, before it multiplies or divides what it summed over them.

Letters: T tokens, A assignments, E experts, N numbers per token.
"""

import abc
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..routing import Routing, RoutingContext


class Scope(abc.ABC):
    """Cuts a batch into parts of equal length. A loss is the mean of the losses of the parts with a real token."""

    @abc.abstractmethod
    def length(self, tokens: int, context: RoutingContext) -> int:
        """How many neighbours among the T tokens are one part; a divisor of T."""

    def parts(self, routing: Routing, context: RoutingContext) -> "Parts":
        """The tokens of a routing, cut."""
        tokens = routing.logits.shape[0]
        return Parts(tokens // self.length(tokens, context), tokens, context.mask)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch(Scope):
    """All tokens of the batch, on all devices; with gradient accumulation those of a micro-batch. Experts may then
    specialize in whole sequences: Qiu et al. 2025, https://arxiv.org/abs/2501.11873."""

    def length(self, tokens: int, context: RoutingContext) -> int:
        return tokens


@dataclass(frozen=True, kw_only=True)
class PerSequence(Scope):
    """Each sequence by itself, a row of the batch, also where several documents are packed into it.

    Keeps single sequences from being unbalanced. DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 17-20.
    """

    def length(self, tokens: int, context: RoutingContext) -> int:
        if context.sequence_length is None:
            raise ValueError(
                "context.sequence_length is None; a loss with scope=PerSequence() needs the number of tokens in a "
                "sequence (the layer fills it in)"
            )
        return context.sequence_length


class Parts(NamedTuple):
    """A batch in `number` parts."""

    number: int
    tokens: int
    """T, of all parts together."""
    mask: Bool[Array, " T"] | None

    def total(self, values: Float[Array, "T N"]) -> Float[Array, "parts N"]:
        """Sum over the real tokens of each part."""
        if self.mask is not None:
            values = jnp.where(self.mask[:, None], values, 0.0)
        return values.reshape(self.number, -1, values.shape[1]).sum(axis=1)

    def mean(self, values: Float[Array, "T N"]) -> Float[Array, "parts N"]:
        """Mean over the real tokens of each part; zero where there are none."""
        return self.total(values) / jnp.maximum(self._real(), 1.0)[:, None]

    def assigned(self, routing: Routing, values: Float[Array, " A"]) -> Float[Array, "parts E"]:
        """Sum of the values of each expert's assignments in each part."""
        experts = jnp.arange(routing.logits.shape[1], dtype=routing.expert.dtype)
        by_expert = jnp.where(routing.expert[:, None] == experts[None], values[:, None], 0.0)
        if self.number == 1:
            return by_expert.sum(axis=0)[None]
        if routing.token is None:  # token-major: a part's assignments are neighbours, as its tokens are
            return by_expert.reshape(self.number, -1, by_expert.shape[1]).sum(axis=1)
        part = routing.token // (self.tokens // self.number)
        return jax.ops.segment_sum(by_expert, part, num_segments=self.number)

    def join(self, losses: Float[Array, " parts"]) -> Float[Array, ""]:
        """Mean over the parts that hold a real token; zero where none does."""
        real = self._real() > 0
        return jnp.where(real, losses, 0.0).sum() / jnp.maximum(real.astype(losses.dtype).sum(), 1.0)

    def _real(self) -> Float[Array, " parts"]:
        """How many real tokens each part holds."""
        if self.mask is None:
            return jnp.full(self.number, self.tokens / self.number, jnp.float32)
        return self.mask.reshape(self.number, -1).sum(axis=1).astype(jnp.float32)
