"""Self-speculative decoding: the first layers draft some tokens, the others verify them all at once.

Elhoushi et al. 2024 (LayerSkip), https://arxiv.org/abs/2404.16710. Draft and verification share weights, keys and
values, and the states that left the drafting layers: those layers run once for each token. What is drawn has the full
model's distribution; greedy answers are the full model's. Drafting ends early where the drafting layers are not sure:
Zhang et al. 2023 (Draft & Verify), https://arxiv.org/abs/2309.08168. Letters: R rows, g tokens drafted at most, D
width, V vocabulary.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...dynamic import Confidence, Top2Gap, accept_greedy, accept_sampled, merge_confidence, split_confidence
from ...dynamic.thresholds import check_threshold
from ..cache import LayerCache
from ..decoder import DecoderLM, NewTokens
from ..layer_stack import refuse_batch_dependence, with_layers
from .early_exit import padded_call
from .engine import Drawn, Usage
from .host_rows import HostRows
from .request import Request
from .samplers import Greedy, Sampler
from .stages import Call, Weights

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
        confidence: Confidence | None = None,
        threshold: float = 0.0,
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
            tokens: g, drafted in a round at most.
            confidence: how sure the drafting layers are of the next token; None: `Top2Gap`.
            threshold: a round drafts no token of which they are less sure than this, 0 to 1; 0: always g tokens.
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
        leaves, structure = jax.tree.flatten(state)
        # A draft may reach past the last token that is wanted; and one row is nobody's.
        self._layers = model.empty_cache(batch=rows + 1, slots=slots + tokens + 1).layers
        exit = 0 if after is None else early.index(after)
        check_threshold("threshold", threshold)
        static, trained = split_confidence(Top2Gap() if confidence is None else confidence)
        self._leaves = Weights(leaves, trained)
        drafting = _Drafting(exit, early[exit], tokens, static, threshold)
        self._programs = _programs(graph, structure, sampler, limit, drafting)
        self._rows = HostRows(rows, slots=slots, vocab=model.config.vocab)
        self._chunk = min(chunk, slots)
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
        self._layers, *answer = self._programs.round(self._leaves, self._layers, call)
        tokens, drafted, counts = (each[: len(indices)] for each in jax.device_get(answer))
        handed = 0
        for index, row, count in zip(indices, tokens.tolist(), counts.tolist(), strict=True):
            for token in row[: count + 1]:
                handed += 1
                if not self._rows.hand_out(index, token):
                    break
        before = self.acceptance
        self.acceptance = Acceptance(
            before.rounds + len(indices), before.drafted + int(drafted.sum()), before.accepted + int(counts.sum())
        )
        self.usage = self.usage._replace(
            drawn_tokens=self.usage.drawn_tokens + handed,
            drawn_seconds=self.usage.drawn_seconds + time.perf_counter() - start,
        )


class _Drafting(NamedTuple):
    """Who drafts, and how long."""

    exit: int
    """Number of the exit."""
    depth: int
    """Layers before it."""
    tokens: int
    """g."""
    confidence: Any
    """Without its weights, see `split_confidence`."""
    threshold: float


class _Programs(NamedTuple):
    """Compiled when first called with a shape."""

    read: Callable[[Weights, tuple[LayerCache, ...], Call], tuple[tuple[LayerCache, ...], Int[Array, " b"]]]
    """A part of some prompts through all layers, and what would follow it."""
    round: Callable[..., tuple[tuple[LayerCache, ...], Int[Array, "b g1"], Int[Array, " b"], Int[Array, " b"]]]
    """g + 1 tokens of each row, how many were drafted, and how many of these are kept: one more is the answer."""


class _Draft(NamedTuple):
    """What a round has drafted so far, in each row b."""

    step: Int[Array, ""]
    token: Int[Array, " b"]
    """The newest, which has not run yet."""
    going: Bool[Array, " b"]
    """Whether it is to run."""
    length: Int[Array, " b"]
    """How many tokens have run."""
    tokens: Int[Array, "b g1"]
    """That have run: the last one of before, then the drafted ones."""
    states: Float[Array, "b g1 D"]
    """That they left the drafting layers with."""
    chances: Any
    """float32 [b, g1, V]: of the drafted tokens; nothing where the draft is greedy."""
    caches: tuple[LayerCache, ...]


@functools.lru_cache(maxsize=16)
def _programs(graph: nnx.GraphDef, structure: Any, sampler: Sampler, limit: int, drafting: _Drafting) -> _Programs:
    """Kept, so that a second engine of the same model compiles nothing."""
    greedy, (exit, depth, most, _, threshold) = isinstance(sampler, Greedy), drafting

    def model_of(weights: Weights) -> DecoderLM:
        return nnx.merge(graph, jax.tree.unflatten(structure, weights.leaves))

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

    def read(weights, layers, call):
        model, steps = model_of(weights), jnp.arange(call.tokens.shape[1])[None]
        new = NewTokens(call.tokens, call.start[:, None] + steps, steps < call.count[:, None])
        caches = tuple(layer._replace(row=call.row) for layer in layers)
        x, caches = model.decode_layers(model.embed(call.tokens), new, caches, first=0)
        newest = jnp.take_along_axis(x, jnp.maximum(call.count - 1, 0)[:, None, None], axis=1)
        token = sampler.choose(filtered(model.head(newest)[:, 0]), keys_of(call, 0, 0))
        return tuple(cache._replace(row=None) for cache in caches), token

    def round(weights, layers, call):
        model, caches = model_of(weights), tuple(layer._replace(row=call.row) for layer in layers)
        confidence, rows = merge_confidence(drafting.confidence, weights.confidence), len(call.row)

        def draft(drafted: _Draft) -> _Draft:
            """One token of each row that goes on through the drafting layers, and the next one if they are sure."""
            step = drafted.step
            new = NewTokens(drafted.token[:, None], (call.start + step)[:, None], drafted.going[:, None])
            x, early = model.decode_layers(model.embed(drafted.token[:, None]), new, drafted.caches, first=0)
            logits = filtered(model.head(x, exit)[:, 0])
            score, _ = confidence.score(
                jnp.full((rows,), exit, jnp.int32), logits, x[:, 0], confidence.initial(rows, x.shape[2])
            )
            following = sampler.choose(logits, keys_of(call, _DRAFTING, step)).astype(jnp.int32)
            chances = drafted.chances
            if not greedy:
                chances = jax.lax.dynamic_update_slice_in_dim(chances, jax.nn.softmax(logits)[:, None], step, axis=1)
            return _Draft(
                step=step + 1,
                token=following,
                going=drafted.going & (score >= threshold) & (step < most),
                length=drafted.length + drafted.going.astype(jnp.int32),
                tokens=jax.lax.dynamic_update_slice_in_dim(drafted.tokens, drafted.token[:, None], step, axis=1),
                states=jax.lax.dynamic_update_slice_in_dim(drafted.states, x, step, axis=1),
                chances=chances,
                caches=early,
            )

        first = _Draft(
            step=jnp.int32(0),
            token=call.tokens[:, 0],
            going=call.count > 0,
            length=jnp.zeros((rows,), jnp.int32),
            tokens=jnp.zeros((rows, most + 1), jnp.int32),
            states=jnp.zeros((rows, most + 1, model.config.width), jnp.dtype(model.config.dtype)),
            chances=() if greedy else jnp.zeros((rows, most + 1, model.config.vocab), jnp.float32),
            caches=caches[:depth],
        )
        # A row drafts nothing in its last step; its state lets the full model add a token of its own.
        drafted = jax.lax.while_loop(lambda drafted: drafted.going.any(), draft, first)
        tokens, lengths = drafted.tokens, jnp.maximum(drafted.length - 1, 0)
        steps = jnp.arange(most + 1)[None]
        new = NewTokens(tokens, call.start[:, None] + steps, steps < drafted.length[:, None])
        x, late = model.decode_layers(drafted.states, new, caches[depth:], first=depth)
        logits = model.head(x)
        logits = filtered(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
        if greedy:
            accepted = accept_greedy(tokens[:, 1:], logits.argmax(axis=2).astype(jnp.int32), lengths)
        else:
            keys = keys_of(call, _ACCEPTING, 0)
            full = jax.nn.softmax(logits)
            accepted = accept_sampled(tokens[:, 1:], drafted.chances[:, :-1], full, keys, lengths)
        # The kept tokens, and behind them the full model's own.
        answer = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        answer = jnp.where(steps == accepted.count[:, None], accepted.token[:, None], answer)
        written = tuple(cache._replace(row=None) for cache in (*drafted.caches, *late))
        return written, answer, lengths, accepted.count

    compiled = functools.partial(jax.jit, donate_argnums=1)
    return _Programs(compiled(read), compiled(round))
