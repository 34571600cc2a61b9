"""Whether a configuration of a family describes a model: the same function of the same arrays."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from ...moe import ClampedSwiGLU, LossFree, MoE, SwiGLU, TopK
from ..attention import Attention
from ..decoder import Decoder, DecoderLM
from .arrays import array_of, places_of, shape_of
from .family import Family
from .fields import Fields
from .load import abstract_model

FREE_FIELDS = ("allow_look_ahead", "dtype", "remat", "unroll", "loss_block", "layer_dropout")
"""Fields of a decoder that change neither its function nor its arrays."""


def check_described(model: DecoderLM, family: Family, fields: Fields) -> dict[str, jax.ShapeDtypeStruct]:
    """Compare a model with what a configuration describes, and return shape and dtype of the model's arrays by path.

    What only training sees, losses, noise and dispatchers, is free, and so is the dtype.

    Raises:
        ValueError: they differ; the field or the array is named.
    """
    described = family.decoder(fields)
    for field in dataclasses.fields(Decoder):
        if field.name in FREE_FIELDS:
            continue
        ours, theirs = (getattr(config, field.name) for config in (model.config, described))
        if field.name in ("attention", "ffn"):  # patterns may say the same in other words
            ours, theirs = (
                [_function(kind.at(layer), described.width) for layer in range(described.layers)]
                for kind in (ours, theirs)
            )
        if ours != theirs:
            raise ValueError(f"model.config.{field.name} is {ours}; config describes {theirs}: they must be the same")
    found, expected = _arrays(model), _arrays(abstract_model(family, fields, described, stacked=False))
    for path in (*expected, *found):
        shapes = [list(arrays[path].shape) if path in arrays else None for arrays in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"config describes {path} as {shapes[0]}; the model's is {shapes[1]}: they must be the same"
            )
    return found


def _function(kind: Any, width: int) -> Any:
    """A layer's attention or feed-forward network without what changes neither its function nor its arrays."""
    if isinstance(kind, Attention):
        _, kv_heads, head_width = kind.shape(width)
        return dataclasses.replace(kind, kv_heads=kv_heads, head_width=head_width, query_block=None)
    if not isinstance(kind, MoE):
        return kind
    router, expert = kind.router, kind.expert
    if isinstance(router, TopK):
        balancing = None if router.balancing is None else LossFree()
        router = dataclasses.replace(router, noise=None, balancing=balancing)
    if isinstance(expert, SwiGLU | ClampedSwiGLU):
        expert = dataclasses.replace(expert, implementation=None)
    return kind.experts, router, expert, kind.shared, kind.latent, kind.residual


def _arrays(model: DecoderLM) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of an unstacked model, by path."""
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    found = {}
    for path, place in places_of(model).items():
        array = array_of(variables[place.variable].get_value(), place.part)
        found[path] = jax.ShapeDtypeStruct(shape_of(array, place), array.dtype)
    return found
