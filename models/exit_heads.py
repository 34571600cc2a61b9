"""The parameters of a model's exits before the last. Letters: D width, V a vocabulary, or classes."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..dynamic import ExitHead, Exits
from .norm import RMSNorm


@runtime_checkable
class HeadConfig(Protocol):
    """What an exit's head reads of its model's configuration."""

    @property
    def width(self) -> int: ...
    @property
    def norm_epsilon(self) -> float: ...


class BuiltExitHead(nnx.Module):
    """What one exit has of its own; None where the model's serves."""

    linear_kernels = {"kernel": 1}  # see models.quantization

    def __init__(self, head: ExitHead, config: HeadConfig, outputs: int, key: jax.Array):
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon) if head.own_norm else None
        self.kernel = _kernel(config.width, outputs, key) if head.own_kernel else None


def _kernel(width: int, outputs: int, key: jax.Array) -> nnx.Param:
    return nnx.Param(jax.nn.initializers.lecun_normal()(key, (width, outputs)), axes=("embed", "vocab"))


def build_exit_heads(exits: Exits, config: HeadConfig, outputs: int, key: jax.Array) -> list[BuiltExitHead]:
    """The heads of the exits before the last, which give `outputs` logits V."""
    keys = jax.random.split(key, len(exits.after))
    return [BuiltExitHead(exits.head, config, outputs, key) for key in keys]


def own_parts(model: Any, exit: int) -> tuple[RMSNorm, Float[Array, "D V"] | None]:
    """The norm and the kernel before the logits of one of `config.exit_depths` (-1: the last); no kernel where the
    model's own head serves."""
    if exit in (-1, len(model.config.exit_depths) - 1):
        return model.final_norm, None
    own = model.exit_heads[exit]
    return own.norm or model.final_norm, None if own.kernel is None else own.kernel[...]
