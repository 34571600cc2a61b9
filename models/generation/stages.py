"""The functions that early exit compiles: one stage of layers for some of the rows, wherever they stand.

A stage is what lies between two exits. Letters: R rows, b rows of a call, S tokens of a row that run at once, D width,
W tokens that may wait before an exit, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...dynamic import Confidence, Thresholds, merge_confidence
from ..cache import LayerCache
from ..decoder import DecoderLM, NewTokens
from .samplers import Sampler


class StagedRows(NamedTuple):
    """What the devices hold of the rows; the last row is nobody's, for calls that are filled up."""

    layers: tuple[LayerCache, ...]
    waiting: tuple[Float[Array, "rows W D"], ...]
    """Before each stage but the first: what enters it, of the tokens that it has not run for."""
    memory: Any
    """What the confidence remembers of each row."""


class Weights(NamedTuple):
    """Of the model and of a confidence that was trained."""

    leaves: list[jax.Array]
    confidence: Any


class Call(NamedTuple):
    """Some rows at one stage. Few arrays, NumPy's or JAX's: the host hands each to the device."""

    tokens: Any
    """int32 [b, S]."""
    numbers: Any
    """int32 [5, b]: what the properties give."""
    key: Any
    """uint32 [b, N]."""

    @property
    def row(self) -> Any:
        """Which row each is."""
        return self.numbers[0]

    @property
    def start(self) -> Any:
        """Position of each row's first token."""
        return self.numbers[1]

    @property
    def count(self) -> Any:
        """How many of its tokens are real; 0 for a row that fills up."""
        return self.numbers[2]

    @property
    def behind(self) -> Any:
        """How many tokens wait before the next stage already."""
        return self.numbers[3]

    @property
    def drawn(self) -> Any:
        """How many tokens the row's request has."""
        return self.numbers[4]


class Answer(NamedTuple):
    """What a stage says of each row's newest token."""

    token: Int[Array, " b"]
    """The next token, if the row leaves here."""
    sure: Bool[Array, " b"]
    """Whether the row may leave here."""


class Stages(NamedTuple):
    """Compiled when first called with a shape."""

    read: Callable[[Weights, StagedRows, Call], tuple[StagedRows, jax.Array]]
    """A part of some prompts through all layers, and what would follow it in each row: [b]."""
    run: tuple[Callable[[Weights, StagedRows, Call], tuple[StagedRows, Answer]], ...]
    """Each stage's layers, its exit's head, confidence and sampling."""


def empty_staged_rows(
    model: DecoderLM, confidence: Confidence, *, rows: int, slots: int, capacity: tuple[int, ...]
) -> StagedRows:
    """Rows without tokens.

    Args:
        model: with exits.
        confidence: of the policy.
        rows: R; one more is made.
        slots: tokens that a row can hold.
        capacity: W before each stage but the first.
    """
    cache = model.empty_cache(batch=rows + 1, slots=slots)
    width, dtype = model.config.width, jnp.dtype(model.config.dtype)
    waiting = tuple(jnp.zeros((rows + 1, tokens, width), dtype) for tokens in capacity)
    return StagedRows(cache.layers, waiting, confidence.initial(rows + 1, width))


@functools.lru_cache(maxsize=16)
def stages(
    graph: nnx.GraphDef,
    structure: Any,
    sampler: Sampler,
    confidence: Any,
    thresholds: Thresholds,
    limit: int,
    depths: tuple[int, ...],
    propagates: bool,
) -> Stages:
    """Kept, so that a second engine of the same model and policy compiles nothing.

    Args:
        graph: of the model, unstacked.
        structure: of its state's leaves.
        sampler: how tokens are chosen.
        confidence: how sure an exit is, without its weights, see `split_confidence`.
        thresholds: at which confidence a row may leave.
        limit: ids from here on are never drawn.
        depths: layers that run before each exit.
        propagates: where a row may leave, also write keys and values of all later layers from its state. Where it goes
            on all the same, the layers write over them.
    """

    def model_of(weights: Weights) -> DecoderLM:
        return nnx.merge(graph, jax.tree.unflatten(structure, weights.leaves))

    def confidence_of(weights: Weights) -> Confidence:
        return merge_confidence(confidence, weights.confidence)

    def choose(logits: jax.Array, of: Call) -> jax.Array:
        allowed = jnp.where(jnp.arange(logits.shape[1])[None] < limit, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(of.key), of.drawn)
        return sampler(allowed, None, keys)

    def read(weights: Weights, held: StagedRows, of: Call) -> tuple[StagedRows, jax.Array]:
        model = model_of(weights)
        caches = tuple(layer._replace(row=of.row) for layer in held.layers)
        x, written = model.decode_layers(model.embed(of.tokens), _new_tokens(of), caches, first=0)
        layers = tuple(layer._replace(row=None) for layer in written)
        return held._replace(layers=layers), choose(model.head(_newest(x, of))[:, 0], of)

    def run(stage: int) -> Callable[[Weights, StagedRows, Call], tuple[StagedRows, Answer]]:
        first, stop = (0, *depths)[stage], depths[stage]

        def call(weights: Weights, held: StagedRows, of: Call) -> tuple[StagedRows, Answer]:
            model, length = model_of(weights), of.tokens.shape[1]
            new = _new_tokens(of)
            x = model.embed(of.tokens) if stage == 0 else held.waiting[stage - 1][of.row, :length]
            caches = tuple(layer._replace(row=of.row) for layer in held.layers[first:stop])
            x, written = model.decode_layers(x, new, caches, first=first)
            layers = (*held.layers[:first], *(layer._replace(row=None) for layer in written), *held.layers[stop:])
            waiting, early = list(held.waiting), stage < len(depths) - 1
            if early:
                waiting[stage] = _put_behind(waiting[stage], x, of)
            newest = _newest(x, of)
            logits = model.head(newest, stage)[:, 0]
            remembered = confidence_of(weights).initial(len(of.row), newest.shape[2])
            if stage:
                remembered = jax.tree.map(lambda array: array[of.row], held.memory)
            exit = jnp.full(of.row.shape, stage, jnp.int32)
            score, remembered = confidence_of(weights).score(exit, logits, newest[:, 0], remembered)
            sure = score >= thresholds.at(exit, of.drawn)
            memory = jax.tree.map(lambda array, now: array.at[of.row].set(now), held.memory, remembered)
            if early and propagates:
                leaving = NewTokens(of.tokens[:, :1], of.start[:, None], (sure & (of.count > 0))[:, None])
                caches = tuple(layer._replace(row=of.row) for layer in held.layers[stop:])
                written = model.remember_layers(newest, leaving, caches, first=stop)
                layers = (*layers[:stop], *(layer._replace(row=None) for layer in written))
            return StagedRows(layers, tuple(waiting), memory), Answer(choose(logits, of), sure)

        return call

    compiled = functools.partial(jax.jit, donate_argnums=1)
    return Stages(compiled(read), tuple(compiled(run(stage)) for stage in range(len(depths))))


def _new_tokens(of: Call) -> NewTokens:
    steps = jnp.arange(of.tokens.shape[1])[None]
    return NewTokens(of.tokens, of.start[:, None] + steps, steps < of.count[:, None])


def _newest(x: Float[Array, "b S D"], of: Call) -> Float[Array, "b 1 D"]:
    return jnp.take_along_axis(x, jnp.maximum(of.count - 1, 0)[:, None, None], axis=1)


def _put_behind(waiting: Float[Array, "rows W D"], x: Float[Array, "b S D"], of: Call) -> Float[Array, "rows W D"]:
    """Put what leaves a stage behind what waits already; padding lands behind it all, or nowhere."""
    place = of.behind[:, None] + jnp.arange(x.shape[1])[None]
    return waiting.at[of.row[:, None], place].set(x, mode="drop")
