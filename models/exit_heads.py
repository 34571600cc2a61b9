"""The parameters of a model's exits before the last. Letters: D width, V vocabulary."""

from typing import Protocol, runtime_checkable

import jax
from flax import nnx

from ..dynamic import ExitHead
from .norm import RMSNorm


@runtime_checkable
class HeadConfig(Protocol):
    """What an exit's head reads of its model's configuration."""

    @property
    def width(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def norm_epsilon(self) -> float: ...


class BuiltExitHead(nnx.Module):
    """What one exit has of its own; None where the model's serves."""

    linear_kernels = {"kernel": 1}  # see models.quantization

    def __init__(self, head: ExitHead, config: HeadConfig, key: jax.Array):
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon) if head.own_norm else None
        self.kernel = _kernel(config, key) if head.own_kernel else None


def _kernel(config: HeadConfig, key: jax.Array) -> nnx.Param:
    initial = jax.nn.initializers.lecun_normal()(key, (config.width, config.vocab))
    return nnx.Param(initial, axes=("embed", "vocab"))


def build_exit_head(head: ExitHead, config: HeadConfig, key: jax.Array) -> BuiltExitHead:
    """The head of one exit."""
    return BuiltExitHead(head, config, key)
