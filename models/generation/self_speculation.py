"""Self-speculative decoding: the first layers draft some tokens, the others verify them all at once.

Elhoushi et al. 2024 (LayerSkip), https://arxiv.org/abs/2404.16710. Draft and verification share weights, keys and
values, and the states that left the drafting layers: those layers run once for each token. What is drawn has the full
model's distribution; greedy answers are the full model's. Letters: R rows, g drafted tokens, D width, V vocabulary.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...dynamic import accept_greedy, accept_sampled
from ..cache import LayerCache
from ..decoder import DecoderLM, NewTokens
from ..layer_stack import refuse_batch_dependence, with_layers
from .early_exit import padded_call
from .engine import Drawn, Usage
from .host_rows import HostRows
from .request import Request
from .samplers import Greedy, Sampler
from .stages import Call

_DRAFTING, _ACCEPTING = 1, 2
"""Folded into a row's key, so that drafting and accepting draw apart."""


class Acceptance(NamedTuple):
    """What became of the drafts so far."""

    rounds: int = 0
    """Verifications, of each row."""
    drafted: int = 0
    accepted: int = 0
    """Of the drafted tokens, those that the full model kept."""

    @property
    def rate(self) -> float:
        """Accepted over drafted; NaN where nothing was drafted. Tokens behind a refused one count as drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """With the full model's own token of each round; NaN before the first."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else float("nan")


class SelfSpeculationEngine:
    """Draws tokens for requests, several in a round. Otherwise as `Engine`.

    engine = SelfSpeculationEngine(model, after=2, tokens=4, rows=1)
    engine.submit(Request(prompt=prompt, max_tokens=100))
    for drawn in engine.run():
        print(drawn.request, drawn.token)
    print(engine.acceptance.rate)
    """

    def __init__(
        self,
        model: DecoderLM,
        *,
        after: int | None = None,
        tokens: int = 4,
        rows: int = 1,
        slots: int = 1024,
        sampler: Sampler | None = None,
        chunk: int = 512,
        vocab: int | None = None,
    ):
        """
        Args:
            model: stacked or unstacked, with exits.
            after: layers that draft: one of the model's exits; None: the first.
            tokens: g, drafted in a round.
            rows: R, requests at a time.
            slots: tokens of prompt and answer that a row can hold.
            sampler: how tokens are chosen; None: greedily.
            chunk: tokens of a prompt that are read at a time.
            vocab: ids from here on are never drawn.

        Raises:
            ValueError: a number is out of bounds; the model has no such exit; its mixtures would make a request depend
                on its neighbours; or a filter of the sampler looks at earlier tokens.
        """
        limit = model.config.vocab if vocab is None else vocab
        for name, value in (("tokens", tokens), ("rows", rows), ("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 1 <= limit <= model.config.vocab:
            raise ValueError(f"vocab is {limit}; it must be at least 1 and at most the model's {model.config.vocab}")
        if model.config.exits is None:
            raise ValueError("Decoder.exits is None; self-speculation needs a model that was trained with exits")
        early = model.config.exit_depths[:-1]
        if after is not None and after not in early:
            raise ValueError(f"after is {after}; the model has exits after {', '.join(map(str, early))} layers")
        refuse_batch_dependence(model.config, None)
        sampler = Greedy() if sampler is None else sampler
        if sampler.needs_seen:
            raise ValueError(f"sampler is {sampler}; with drafts no filter may look at the tokens before")
        graph, state = nnx.split(with_layers(model, stacked=False))
        self._leaves, structure = jax.tree.flatten(state)
        # A draft may reach past the last token that is wanted; and one row is nobody's.
        self._layers = model.empty_cache(batch=rows + 1, slots=slots + tokens + 1).layers
        exit = 0 if after is None else early.index(after)
        self._programs = _programs(graph, structure, sampler, limit, exit, early[exit], tokens)
        self._rows = HostRows(rows, slots=slots, vocab=model.config.vocab)
        self._tokens, self._chunk = tokens, min(chunk, slots)
        self.slots, self.vocab = slots, model.config.vocab
        self.usage, self.acceptance = Usage(), Acceptance()

    def submit(self, request: Request) -> int:
        """Queue a request, also while others run, and return its number, counted from 0.

        Raises:
            ValueError: as `Request.check`.
        """
        return self._rows.submit(request)

    def cancel(self, number: int) -> None:
        """End a request: it draws nothing more. One that has ended stays as it is."""
        self._rows.cancel(number)

    def run(self) -> Iterator[Drawn]:
        """Draw until no request is left. It may be left and called again: it goes on where it was."""
        while True:
            while self._rows.arrived:
                yield self._rows.arrived.popleft()
            for index in self._rows.admit():
                self._read(index)
            if busy := self._rows.busy:
                self._round(busy)
            elif not self._rows.arrived and not self._rows.waiting:
                return

    def _read(self, index: int) -> None:
        start, prompt, token = time.perf_counter(), self._rows[index].request.prompt, 0
        for begin in range(0, len(prompt), self._chunk):
            call = padded_call(self._rows, [index], [begin], [0], [prompt[begin : begin + self._chunk]])
            self._layers, tokens = self._programs.read(self._leaves, self._layers, call)
            token = int(np.asarray(tokens)[0])
        self._rows.hand_out(index, token)
        self.usage = self.usage._replace(
            prompt_tokens=self.usage.prompt_tokens + len(prompt),
            prompt_seconds=self.usage.prompt_seconds + time.perf_counter() - start,
        )

    def _round(self, indices: list[int]) -> None:
        """Draft, verify, hand out, in every row."""
        start = time.perf_counter()
        places = [len(self._rows[index].tokens) - 1 for index in indices]
        last = [self._rows[index].tokens[-1:] for index in indices]
        call = padded_call(self._rows, indices, places, [0] * len(indices), last)
        self._layers, drawn, counts = self._programs.round(self._leaves, self._layers, call)
        tokens, counts = jax.device_get((drawn, counts))
        handed = 0
        for index, row, count in zip(indices, tokens.tolist(), counts.tolist(), strict=False):
            for token in row[: count + 1]:
                handed += 1
                if not self._rows.hand_out(index, token):
                    break
        before, kept = self.acceptance, int(counts[: len(indices)].sum())
        self.acceptance = Acceptance(
            before.rounds + len(indices), before.drafted + len(indices) * self._tokens, before.accepted + kept
        )
        self.usage = self.usage._replace(
            drawn_tokens=self.usage.drawn_tokens + handed,
            drawn_seconds=self.usage.drawn_seconds + time.perf_counter() - start,
        )


class _Programs(NamedTuple):
    """Compiled when first called with a shape."""

    read: Callable[[list[jax.Array], tuple[LayerCache, ...], Call], tuple[tuple[LayerCache, ...], Int[Array, " b"]]]
    """A part of some prompts through all layers, and what would follow it."""
    round: Callable[..., tuple[tuple[LayerCache, ...], Int[Array, "b g1"], Int[Array, " b"]]]
    """g + 1 tokens of each row, and how many drafted ones among them are kept: one more than these is the answer."""


@functools.lru_cache(maxsize=16)
def _programs(
    graph: nnx.GraphDef, structure: Any, sampler: Sampler, limit: int, exit: int, depth: int, drafted: int
) -> _Programs:
    """Kept, so that a second engine of the same model compiles nothing. `depth` layers draft, up to exit `exit`."""
    greedy = isinstance(sampler, Greedy)

    def model_of(leaves: list[jax.Array]) -> DecoderLM:
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

    def filtered(logits: Float[Array, "b V"]) -> Float[Array, "b V"]:
        logits = jnp.where(jnp.arange(logits.shape[-1])[None] < limit, logits, -jnp.inf)
        for filter in sampler.filters:
            logits = filter(logits, None)
        return logits

    def keys_of(call: Call, purpose: int, step: jax.Array | int) -> Array:
        keys = jax.random.wrap_key_data(call.key)
        return jax.vmap(lambda key, drawn: jax.random.fold_in(jax.random.fold_in(key, purpose), drawn + step))(
            keys, call.drawn
        )

    def read(leaves, layers, call):
        model, steps = model_of(leaves), jnp.arange(call.tokens.shape[1])[None]
        new = NewTokens(call.tokens, call.start[:, None] + steps, steps < call.count[:, None])
        caches = tuple(layer._replace(row=call.row) for layer in layers)
        x, caches = model.decode_layers(model.embed(call.tokens), new, caches, first=0)
        newest = jnp.take_along_axis(x, jnp.maximum(call.count - 1, 0)[:, None, None], axis=1)
        token = sampler.choose(filtered(model.head(newest)[:, 0]), keys_of(call, 0, 0))
        return tuple(cache._replace(row=None) for cache in caches), token

    def round(leaves, layers, call):
        model, real = model_of(leaves), (call.count > 0)[:, None]
        caches = tuple(layer._replace(row=call.row) for layer in layers)

        def draft(carry, step):
            token, early = carry
            new = NewTokens(token[:, None], (call.start + step)[:, None], real)
            x, early = model.decode_layers(model.embed(token[:, None]), new, early, first=0)
            logits = filtered(model.head(x, exit)[:, 0])
            following = sampler.choose(logits, keys_of(call, _DRAFTING, step)).astype(jnp.int32)
            chances = () if greedy else jax.nn.softmax(logits)
            return (following, early), (token, x[:, 0], chances)

        # The last step drafts in vain; but the state that it leaves lets the full model add a token of its own.
        carry, drafts = jax.lax.scan(draft, (call.tokens[:, 0], caches[:depth]), jnp.arange(drafted + 1))
        tokens, states, chances = jax.tree.map(lambda array: array.swapaxes(0, 1), drafts)
        places = call.start[:, None] + jnp.arange(drafted + 1)[None]
        new = NewTokens(tokens, places, jnp.broadcast_to(real, places.shape))
        x, late = model.decode_layers(states, new, caches[depth:], first=depth)
        logits = model.head(x)
        logits = filtered(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
        if greedy:
            accepted = accept_greedy(tokens[:, 1:], logits.argmax(axis=2).astype(jnp.int32))
        else:
            keys = keys_of(call, _ACCEPTING, 0)
            accepted = accept_sampled(tokens[:, 1:], chances[:, :-1], jax.nn.softmax(logits), keys)
        # The kept tokens, and behind them the full model's own.
        answer = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        answer = jnp.where(jnp.arange(drafted + 1)[None] == accepted.count[:, None], accepted.token[:, None], answer)
        written = tuple(cache._replace(row=None) for cache in (*carry[1], *late))
        return written, answer, accepted.count

    compiled = functools.partial(jax.jit, donate_argnums=1)
    return _Programs(compiled(read), compiled(round))
