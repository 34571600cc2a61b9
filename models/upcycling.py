"""A trained dense decoder becomes one whose feed-forward networks are, in some layers or all, mixtures of experts.

What lies outside of these networks is copied by path; `moe.upcycling` says how experts are made of a dense network.
"""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..moe import MoE
from ..moe.upcycling import DenseWeights, ExpertWeights, Upcycling
from .decoder import Decoder, DecoderLM
from .layer_stack import with_layers

FREE_FIELDS = ("ffn", "allow_look_ahead", "dtype", "remat", "loss_block", "unroll")
"""Fields of a decoder in which the dense model may differ: the function does not depend on the rest of them."""
Flat = dict[tuple[Any, ...], nnx.Variable]


def upcycled_layers(dense: Decoder, mixture: Decoder) -> tuple[int, ...]:
    """The layers of `mixture` that are made of a dense network of `dense`.

    Raises:
        ValueError: one model cannot become the other: it is a mixture already, they differ in more than the
            feed-forward networks, or no layer is to become a mixture.
    """
    for field in fields(Decoder):
        before, after = getattr(dense, field.name), getattr(mixture, field.name)
        if field.name not in FREE_FIELDS and before != after:
            raise ValueError(
                f"model.{field.name} is {after}, and {before} in the dense model; allowed are models that differ in "
                f"{', '.join(FREE_FIELDS)}"
            )
    pairs = list(zip(dense.feed_forwards, mixture.feed_forwards, strict=True))
    for layer, (before, after) in enumerate(pairs):
        if isinstance(before, MoE):
            raise ValueError(
                f"the feed-forward network of layer {layer} is a mixture already, {before.experts} experts; upcycling "
                "needs a dense model"
            )
        if before != after and not isinstance(after, MoE):
            raise ValueError(
                f"model.ffn of layer {layer} is {after}, and {before} in the dense model; it must be that, or an MoE"
            )
    layers = tuple(layer for layer, (_, after) in enumerate(pairs) if isinstance(after, MoE))
    if not layers:
        raise ValueError(f"model.ffn is {mixture.ffn}, in every layer; upcycling needs an MoE in one layer or more")
    return layers


def check_upcycling(dense: Decoder, mixture: Decoder, technique: Upcycling) -> tuple[int, ...]:
    """Find out, without computing anything, whether `upcycle` would refuse, and return the layers that it changes.

    Raises:
        ValueError: as `upcycle`.
    """
    layers = upcycled_layers(dense, mixture)
    key = jax.random.key(0)
    nnx.eval_shape(lambda: upcycle(dense.build(key), mixture.build(key), technique, key))
    return layers


def upcycle(dense: DecoderLM, fresh: DecoderLM, technique: Upcycling, key: jax.Array) -> DecoderLM:
    """Move what a dense model has learned into a mixture.

    A shared expert keeps its fresh weights, except that its down projection becomes zero: it adds nothing at first, so
    it does not disturb the function, and learns from the first step on.

    Args:
        dense: the trained model, stacked or unstacked.
        fresh: a new model, whose layers are those of `dense` or an `MoE`. It gives routers and what they remember.
        technique: makes the experts.
        key: randomness of the technique; each layer gets its own.

    Returns:
        The model in the form of `fresh`; neither is changed. Runs under jit.

    Raises:
        ValueError: the two models, their sizes or the routers do not fit; the layer is named.
    """
    layers = upcycled_layers(dense.config, fresh.config)
    source = _flat(with_layers(dense, stacked=False))
    whole = with_layers(fresh, stacked=False)
    graph, state = nnx.split(whole)
    target: Flat = dict(nnx.to_flat_state(state))
    places = {_feed_forward(layer): layer for layer in layers}
    kept = {path: var for path, var in target.items() if path[: len(_feed_forward(0))] not in places}
    target |= {path: variable.replace(source[path].get_value()) for path, variable in kept.items()}
    for place, layer in places.items():
        try:
            mixture: Any = fresh.config.feed_forwards[layer]
            new = _mixture(
                _below(source, place), _below(target, place), mixture, technique, jax.random.fold_in(key, layer)
            )
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
        target |= {(*place, *path): variable for path, variable in new.items()}
    model = nnx.merge(graph, nnx.from_flat_state(target))
    return with_layers(model, stacked=True) if any(segment.depth > 1 for segment in fresh.segments) else model


def _mixture(dense: Flat, fresh: Flat, mixture: MoE, technique: Upcycling, key: jax.Array) -> Flat:
    """The variables of one mixture, by their paths in it."""
    names = {path[0] for path in dense if len(path) == 1}
    if len(names) < len(dense) or names not in ({"gate", "up", "down"}, {"up", "down"}):
        raise ValueError(
            f"the dense network has the weights {_listed(dense)}; upcycling knows up and down, with or without a gate"
        )
    if strange := [path for path in fresh if path[0] not in ("experts", "router", "shared")]:
        raise ValueError(f"the mixture has the weights {_listed(strange)}, which upcycling knows nothing of")
    arrays = {path[0]: variable.get_value() for path, variable in dense.items()}
    gates = [path for path in fresh if path[0] == "router" and path[-2:] == ("gate", "kernel")]
    gate = fresh[gates[0]].get_value() if len(gates) == 1 else None
    weights = DenseWeights(arrays.get("gate"), arrays["up"], arrays["down"])
    experts, gate = technique(weights, gate, mixture=mixture, key=key)
    new = _experts({path: variable for path, variable in fresh.items() if path[0] == "experts"}, experts, mixture)
    if gate is not None:
        wanted = fresh[gates[0]].get_value().shape
        if gate.shape != wanted:
            raise ValueError(
                f"MoE.router is {mixture.router}, whose gate is {list(wanted)}; {type(technique).__name__} makes one "
                f"of {list(gate.shape)}: they must be the same"
            )
        new |= {gates[0]: fresh[gates[0]].replace(gate)}
    return new | _silent_shared({path: variable for path, variable in fresh.items() if path[0] == "shared"})


def _experts(fresh: Flat, weights: ExpertWeights, mixture: MoE) -> Flat:
    made = {("experts", name): array for name, array in weights._asdict().items() if array is not None}
    wanted = {path: variable.get_value().shape for path, variable in fresh.items()}
    found = {path: array.shape for path, array in made.items()}
    if wanted != found:
        raise ValueError(
            f"MoE.expert is {mixture.expert}, {mixture.experts} of which have the weights {_shapes(wanted)}; the "
            f"technique makes {_shapes(found)}: they must be the same"
        )
    return {path: variable.replace(made[path].astype(variable.get_value().dtype)) for path, variable in fresh.items()}


def _silent_shared(fresh: Flat) -> Flat:
    """The shared expert's down projection, zero."""
    if fresh and all(path[-1] != "down" for path in fresh):
        raise ValueError(
            f"MoE.shared has the weights {_listed(fresh)}; upcycling silences it by the one named down, which it must "
            "have"
        )
    return {path: var.replace(jnp.zeros_like(var.get_value())) for path, var in fresh.items() if path[-1] == "down"}


def _feed_forward(layer: int) -> tuple[Any, ...]:
    """Where the feed-forward network of a layer is in an unstacked model."""
    return ("segments", layer, "unit", "layers", 0, "ffn")


def _flat(model: DecoderLM) -> Flat:
    return dict(nnx.to_flat_state(nnx.state(model)))


def _below(flat: Flat, place: tuple[Any, ...]) -> Flat:
    return {path[len(place) :]: variable for path, variable in flat.items() if path[: len(place)] == place}


def _listed(paths: Any) -> str:
    return ", ".join(".".join(map(str, path)) for path in paths) or "none"


def _shapes(shapes: dict[tuple[Any, ...], tuple[int, ...]]) -> str:
    return ", ".join(f"{path[-1]} {list(shape)}" for path, shape in sorted(shapes.items()))
