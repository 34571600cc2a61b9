"""`dynamoe bench generation`: reading prompts and drawing tokens, against transformers' `generate`, same weights.

Letters: B rows, D width, L layers, E experts, K experts per token.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from ...kernels.ceilings import measure_ceilings
from ...kernels.measuring import Call, in_turns
from ...models import DecoderLM
from ...models.accounting import count_parts
from ...models.generation import Engine, Request
from ..page import Table
from ..tables import for_terminal
from .generation_models import QWEN_LIKE, Shape, decoder, transformers_model

LOGIT_ERROR = 1e-4
"""Allowed difference of logits, as a part of the largest."""
OURS, PEER = "dynamoe", "transformers' generate"


def bench_generation(rounds: int, console: Console, shape: Shape = QWEN_LIKE) -> int:
    """Check logits and tokens, then time; 1 where they are wrong."""
    model = decoder(shape).build(jax.random.key(0), stacked=False)
    parameters = count_parts(model.config, shape.short)[-1].parameters
    threads = os.cpu_count() or 1
    peer = transformers_model(shape, model, threads) if _installed(console) else None
    console.print(
        f"{parameters:,} parameters, {shape.layers} layers, {shape.experts} experts, {shape.chosen} per token, "
        f"float32, {threads} threads",
        highlight=False,
    )
    if not all(check(console) for check in _checks(shape, model, peer)):
        console.print("a result is wrong: nothing is timed")
        return 1
    bandwidth = measure_ceilings(()).bytes
    rows = []
    for batch in shape.batches:
        found = _timed(shape, model, peer, batch, rounds)
        rows += list(_lines(shape, model, batch, found, bandwidth))
    caption = (
        f"Medians of {rounds} rounds in turns; ratios are those of the times of one round. Drawing is the time of "
        f"{shape.tokens} more tokens after prompts of {shape.short}. Bandwidth: bytes of the weights that a step reads "
        f"(of experts the expected number that {shape.chosen} of {shape.experts} in each row are) and of the cache, "
        f"over those of a copy, {bandwidth / 1e9:.1f} GB/s."
    )
    console.print(for_terminal(Table(("", "batch", "tokens/s", "ratio", "bandwidth"), rows, caption)))
    ratio = _unused_length(shape, model, rounds)
    console.print(
        f"a token drawn with a cache of {shape.long:,} slots takes {ratio:.2f} times one with just as many as needed",
        highlight=False,
    )
    return 0


def _installed(console: Console) -> bool:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"{' and '.join(missing)} is not installed: no comparison with it", highlight=False)
    return not missing


def _prompts(shape: Shape, batch: int, length: int) -> np.ndarray:
    """Different tokens in each row, so that rows choose different experts."""
    return np.random.default_rng(batch).integers(0, shape.vocab, (batch, length))


def _engine(model: DecoderLM, *, rows: int, slots: int) -> Engine:
    return Engine(model, rows=rows, slots=slots)


def _generate(engine: Engine, prompts: np.ndarray, tokens: int) -> list[list[int]]:
    numbers = [engine.submit(Request(prompt=tuple(prompt), max_tokens=tokens)) for prompt in prompts.tolist()]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    for drawn in engine.run():
        answers[drawn.request].append(drawn.token)
    return list(answers.values())


def _checks(shape: Shape, model: DecoderLM, peer: Any) -> Iterator[Callable[[Console], bool]]:
    """Tokens against full forward passes, logits and tokens against the other library."""
    batch = max(shape.batches)
    prompts, tokens = _prompts(shape, batch, shape.short), min(shape.tokens, 8)
    found = _generate(_engine(model, rows=batch, slots=shape.short + shape.tokens), prompts, tokens)
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)
    whole = np.concatenate([prompts, np.array(found)], axis=1).astype(np.int32)
    logits = np.asarray(forward(state, jnp.asarray(whole)))
    follows = logits[:, shape.short - 1 : -1].argmax(axis=2).tolist()
    yield lambda console: _same("full forward passes", found, follows, console)
    if peer is not None:
        yield lambda console: _close(logits, peer.logits(whole), console)
        yield lambda console: _same(PEER, found, peer.generate(prompts, tokens), console)


def _same(name: str, found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], console: Console) -> bool:
    equal = [list(a) for a in found] == [list(b) for b in expected]
    console.print(f"greedy tokens of {len(found)} rows are {'' if equal else 'not '}those of {name}", highlight=False)
    return equal


def _close(found: np.ndarray, expected: np.ndarray, console: Console) -> bool:
    error = float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())
    console.print(f"largest error of logits against {PEER}: {error:.1e}, allowed is {LOGIT_ERROR:.0e}", highlight=False)
    return error <= LOGIT_ERROR


def _timed(shape: Shape, model: DecoderLM, peer: Any, batch: int, rounds: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Seconds of reading long prompts, and of drawing tokens after short ones, by who did it."""
    long, short = (_prompts(shape, batch, length) for length in (shape.prompt, shape.short))
    reading = _engine(model, rows=batch, slots=shape.prompt)
    drawing = _engine(model, rows=batch, slots=shape.short + shape.tokens)
    calls: dict[tuple[str, str], Call] = {}

    def add(name: str, read: Callable[[], Any], one: Callable[[], Any], more: Callable[[], Any]) -> None:
        for what, call in (("read", read), ("one", one), ("more", more)):
            calls[name, what] = Call(call, lambda _: None)

    add(
        OURS,
        lambda: _generate(reading, long, 1),
        lambda: _generate(drawing, short, 1),
        lambda: _generate(drawing, short, 1 + shape.tokens),
    )
    if peer is not None:
        add(
            PEER,
            lambda: peer.generate(long, 1),
            lambda: peer.generate(short, 1),
            lambda: peer.generate(short, 1 + shape.tokens),
        )
    for call in calls.values():
        call()
    seconds = in_turns(calls, rounds)
    names = dict.fromkeys(name for name, _ in calls)
    return {name: (seconds[name, "read"], seconds[name, "more"] - seconds[name, "one"]) for name in names}


def _lines(
    shape: Shape, model: DecoderLM, batch: int, found: dict[str, tuple[np.ndarray, ...]], bandwidth: float
) -> Iterator[tuple[str, ...]]:
    """For each pass and library: tokens per second, how many times the other's, and the share of the bandwidth."""
    for place, (what, count) in enumerate((("read", shape.prompt), ("drawn", shape.tokens))):
        for name, seconds in found.items():
            times = seconds[place]
            ratio = f"{np.median(found[PEER][place] / times):.2f}" if PEER in found else ""
            share = bytes_per_step(shape, model, batch) * count / np.median(times) / bandwidth if place else None
            yield (
                f"{what}, {name}",
                str(batch),
                f"{batch * count / np.median(times):,.0f}",
                ratio,
                "" if share is None else f"{share:.0%}",
            )


def bytes_per_step(shape: Shape, model: DecoderLM, batch: int) -> float:
    """What a step has to read at least: of E experts those that are expected to be chosen in B rows, all other weights
    but the embedding, and the keys and values of half of the tokens that are drawn after the prompts."""
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        size = variable.get_value().nbytes
        if "expert" in (variable.get_metadata().get("axes") or ()):
            size *= 1 - (1 - shape.chosen / shape.experts) ** batch
        total += 0 if path[0] == "embedding" else size
    held = shape.short + shape.tokens / 2
    return total + batch * held * shape.layers * 2 * shape.kv_heads * shape.head_width * 4


def _unused_length(shape: Shape, model: DecoderLM, rounds: int) -> float:
    """The time of a token with a cache that is far too large, over that with one that is just large enough."""
    prompts = _prompts(shape, 1, shape.short)
    engines = {slots: _engine(model, rows=1, slots=slots) for slots in (shape.short + shape.tokens, shape.long)}
    calls = {
        (slots, tokens): Call(lambda engine=engine, tokens=tokens: _generate(engine, prompts, tokens), lambda _: None)
        for slots, engine in engines.items()
        for tokens in (1, 1 + shape.tokens)
    }
    for call in calls.values():
        call()
    seconds = in_turns(calls, rounds)
    just, large = (seconds[slots, 1 + shape.tokens] - seconds[slots, 1] for slots in engines)
    return float(np.median(large / just))
