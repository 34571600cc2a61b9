"""Soft mixture of experts: every expert works on mixtures of a sequence's tokens, and nothing is chosen.

Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", https://arxiv.org/abs/2308.00951, algorithm 1 and
section 2.3. Fully differentiable, balanced by construction, nothing dropped; the cost is that of the slots, however
many experts share them. A token's output depends on all tokens of its sequence.

Letters: N sequences, S tokens of one, D width, E experts, C slots of an expert, Z = E * C slots.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .experts import Experts, SwiGLU
from .feed_forward import FeedForward, Tap, no_tap
from .routing import NO_CONTEXT, RoutingContext


@dataclass(frozen=True, kw_only=True)
class SoftMoE(FeedForward):
    """Each slot is a weighted mean of its sequence's tokens, each token's output one of what the experts make of them.

    It mixes the last axis before the width, so that sequences of a batch do not see each other; padding takes no part.
    A sequence costs the same matrix products in the experts whatever its length. In a causal decoder training sees the
    future, and decoding token by token is another function.
    """

    experts: int = 8
    """Number of experts E."""
    slots: int = 16
    """Slots of each expert C; the cost of a sparse layer with one expert per token is E * C = S, the paper's choice."""
    expert: Experts = SwiGLU()
    """The network that each expert is."""
    normalize: bool = True
    """Compare tokens and slots by the cosine of their angle times a learned gain (section 2.3), instead of by their
    product, which saturates where the width is large."""

    def __post_init__(self):
        for name in ("experts", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"SoftMoE.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def looks_ahead(self) -> bool:
        return True

    def flops_fraction(self, sequence_length: int) -> float:
        return self.slots / sequence_length

    def mixing_flops(self, width: int) -> float:
        return 4.0 * self.experts * self.slots * width

    def build(self, *, width: int, key: jax.Array) -> "SoftMoELayer":
        return SoftMoELayer(self, width=width, key=key)


class SoftMoELayer(nnx.Module):
    """Mixes tokens into slots, runs the experts on them, and mixes the slots into tokens."""

    def __init__(self, config: SoftMoE, *, width: int, key: jax.Array):
        router, experts = jax.random.split(key)
        self.config = config
        self.width = width
        self.router = SlotRouter(config, width=width, key=router)
        self.experts = config.expert.build(experts=config.experts, width=width, key=experts)

    def __call__(
        self, x: Float[Array, "*batch D"], context: RoutingContext = NO_CONTEXT, tap: Tap = no_tap
    ) -> tuple[Float[Array, "*batch D"], None]:
        """Mix within each sequence, the axis before the width.

        Args:
            x: activations, any batch axes, a sequence, the width D.
            context: the mask over the T flattened tokens; the rest plays no part.
            tap: looks at the layer's input under the path "ffn"; there is no routing to look at.

        Returns:
            The output, in the shape and dtype of x (zero at padding), and None: there are no assignments to measure.

        Raises:
            ValueError: x or the mask has another shape.
        """
        if x.ndim < 2 or x.shape[-1] != self.width or 0 in x.shape:
            raise ValueError(
                f"x has shape {x.shape}; it must be [..., S, {self.width}], with at least one sequence and token"
            )
        tap("ffn", x, None)
        sequences = x.reshape(-1, *x.shape[-2:])
        real = self._real(sequences, context)
        sequences = jnp.where(real[..., None], sequences, 0)
        dispatch, combine = (weight.astype(x.dtype) for weight in self.router(sequences, real))
        slots = jnp.einsum("nsz,nsd->znd", dispatch, sequences)
        # Slots of an expert stand together: [Z, N, D] is [E, C * N, D].
        rows = self.experts(slots.reshape(self.config.experts, -1, self.width), None)
        y = jnp.einsum("nsz,znd->nsd", combine, rows.reshape(slots.shape))
        return y.reshape(x.shape), None

    def _real(self, sequences: Float[Array, "N S D"], context: RoutingContext) -> Bool[Array, "N S"]:
        count, length, _ = sequences.shape
        if context.mask is None:
            return jnp.ones((count, length), bool)
        if context.mask.shape != (count * length,):
            raise ValueError(
                f"context.mask has shape {context.mask.shape}; it must be ({count * length},), one per token of x"
            )
        return context.mask.reshape(count, length)


class SlotRouter(nnx.Module):
    """The vector of each slot, phi [D, Z], and the gain of the cosines. Float32, whatever the activations are."""

    def __init__(self, config: SoftMoE, *, width: int, key: jax.Array):
        initial = jax.nn.initializers.lecun_normal()(key, (width, config.experts * config.slots), jnp.float32)
        self.phi = nnx.Param(initial, axes=("embed", None))
        self.gain = nnx.Param(jnp.ones((), jnp.float32), axes=()) if config.normalize else None

    def __call__(
        self, x: Float[Array, "N S D"], real: Bool[Array, "N S"]
    ) -> tuple[Float[Array, "N S Z"], Float[Array, "N S Z"]]:
        """The weights of a sequence's tokens in each slot, and those of the slots in each token; zero at padding."""
        x, phi = x.astype(jnp.float32), self.phi[...].astype(jnp.float32)
        if self.gain is not None:
            x, phi = _unit(x, axis=2), _unit(phi, axis=0) * self.gain[...].astype(jnp.float32)
        # "highest": the default precision of a float32 product is bfloat16 on TPUs and TF32 on NVIDIA's cards.
        logits = jnp.matmul(x, phi, precision="highest")
        real = real[..., None]
        dispatch = jax.nn.softmax(jnp.where(real, logits, jnp.finfo(jnp.float32).min), axis=1)
        return jnp.where(real, dispatch, 0.0), jnp.where(real, jax.nn.softmax(logits, axis=2), 0.0)


def _unit(vectors: Float[Array, "..."], *, axis: int) -> Float[Array, "..."]:
    """Vectors of length 1; zero stays zero, and its gradient finite."""
    return vectors * jax.lax.rsqrt(jnp.square(vectors).sum(axis=axis, keepdims=True) + _EPSILON)


_EPSILON = 1e-12
"""Far below the squared length of any vector that means something."""
