"""Sampling from a decoder with a carried key-value cache.

Letters: B rows, S prompt length, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .cache import Cache
from .decoder import DecoderLM, with_layers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens only; none: among all."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be finite and at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or none")

    def draw(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        """One token per row."""
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        if self.top_k is not None:
            lowest = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        return jax.random.categorical(key, logits / self.temperature)


def generate(
    model: DecoderLM,
    prompts: list[list[int]],
    *,
    tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop: int | None = None,
    vocab: int | None = None,
) -> Iterator[np.ndarray]:
    """Continue prompts, one token per row and step.

    Args:
        model: stacked or unstacked.
        prompts: token ids of each row, at least one each; rows may differ in length.
        tokens: how many to draw at most.
        sampling: how they are drawn.
        key: the randomness; the same key gives the same tokens.
        stop: end of a row; after it the row yields `stop` again. The iterator ends when all rows have.
        vocab: ids from here on are never drawn: the tokenizer's vocabulary where the model's is padded beyond it.

    Yields:
        The next token of every row, int [B].

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a number of tokens below 1, or a `vocab` that is not
            within the model's; at the call, before the first token is asked for.
    """
    limit = model.config.vocab if vocab is None else vocab
    _check(prompts, tokens, stop, limit, model.config.vocab)
    return _tokens(model, prompts, tokens, sampling, key, stop, limit)


def _tokens(
    model: DecoderLM,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop: int | None,
    limit: int,
) -> Iterator[np.ndarray]:
    lengths = [len(prompt) for prompt in prompts]
    # Lengths are rounded up so that prompts of many lengths share a compiled function.
    width = -(-max(lengths) // 32) * 32
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    graph, state = nnx.split(with_layers(model, stacked=False))
    prefill, step = generation_steps(graph, sampling, limit)
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    cache = model.empty_cache(batch=len(prompts), slots=max(width, max(lengths) + tokens))
    token, cache = prefill(state, padded, mask, cache, jax.random.fold_in(key, 0))
    ended = np.zeros(len(prompts), bool)
    for index in range(1, tokens + 1):
        row = np.where(ended, stop, np.asarray(token)) if stop is not None else np.asarray(token)
        yield row
        ended |= row == stop if stop is not None else False
        if ended.all() or index == tokens:
            return
        token, cache = step(state, token, cache, jax.random.fold_in(key, index))


@functools.lru_cache(maxsize=8)
def generation_steps(graph: nnx.GraphDef, sampling: Sampling, limit: int) -> tuple[Callable, Callable]:
    """Prefill and step of one unstacked model: `prefill(state, prompt [B S], mask [B S], cache, key)` and `step(state,
    token [B], cache, key)`. Each consumes the cache and returns the next token and the new cache.

    They are kept, so that a second call with the same shapes compiles nothing.
    """

    def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
        allowed = jnp.arange(logits.shape[-1]) < limit
        return sampling.draw(jnp.where(allowed[None], logits, -jnp.inf), key)

    def prefill(state: nnx.State, prompt: jax.Array, mask: Bool[Array, "B S"], cache: Cache, key: jax.Array):
        logits, cache = nnx.merge(graph, state).decode(prompt, cache, mask)
        last = jnp.take_along_axis(logits, cache.length[:, None, None] - 1, axis=1)[:, 0]
        return draw(last, key), cache

    def step(state: nnx.State, token: Int[Array, " B"], cache: Cache, key: jax.Array):
        logits, cache = nnx.merge(graph, state).decode(token[:, None], cache)
        return draw(logits[:, 0], key), cache

    return jax.jit(prefill, donate_argnums=3), jax.jit(step, donate_argnums=2)


def _check(prompts: list[list[int]], tokens: int, stop: int | None, limit: int, vocab: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    if not prompts or not all(prompts):
        raise ValueError(f"prompts is {prompts}; there must be at least one, and each needs at least one token")
    if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < vocab]:
        raise ValueError(f"prompts hold the token id {wrong[0]}; allowed are 0 to {vocab - 1}")
    if not 1 <= limit <= vocab:
        raise ValueError(f"vocab is {limit}; it must be at least 1 and at most the model's {vocab}")
    if stop is not None and not 0 <= stop < vocab:
        raise ValueError(f"stop is {stop}; allowed are 0 to {vocab - 1}, or None")
