"""`dynamoe bench generation`: reading prompts and drawing tokens, against transformers' `generate`, same weights.

Letters: B rows, D width, L layers, E experts, K experts per token.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from ...kernels.ceilings import measure_ceilings
from ...kernels.measuring import Call, in_turns
from ...models import Attention, Decoder, DecoderLM
from ...models.accounting import count_parts
from ...models.generation import Engine, Request
from ...moe import MoE, SwiGLU, TopK
from ..page import Table
from ..tables import for_terminal

LOGIT_ERROR = 1e-4
"""Allowed difference of logits, as a part of the largest."""
OURS, PEER = "dynamoe", "transformers' generate"


class Shape(NamedTuple):
    """Of a model like Qwen3-MoE, and of what it is asked."""

    vocab: int = 16_384
    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 64
    experts: int = 32
    chosen: int = 4
    hidden: int = 256
    prompt: int = 512
    """Tokens of a prompt that is read."""
    short: int = 64
    """Tokens of a prompt after which tokens are drawn."""
    tokens: int = 32
    """Tokens that are drawn."""
    batches: tuple[int, ...] = (1, 8)
    long: int = 8192
    """Slots of a cache that is hardly used."""


QWEN_LIKE = Shape()
"""Qwen3-MoE's layers at a size for a CPU: 124 million parameters."""


def bench_generation(rounds: int, console: Console, shape: Shape = QWEN_LIKE) -> int:
    """Check logits and tokens, then time; 1 where they are wrong."""
    model = _config(shape).build(jax.random.key(0), stacked=False)
    parameters = count_parts(model.config, shape.short)[-1].parameters
    threads = os.cpu_count() or 1
    peer = _transformers_model(shape, model, threads) if _installed(console) else None
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


def _config(shape: Shape) -> Decoder:
    router = TopK(k=shape.chosen, renormalize=True)
    return Decoder(
        vocab=shape.vocab,
        width=shape.width,
        layers=shape.layers,
        attention=Attention(
            heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width, qk_norm=True, rope_theta=10_000.0
        ),
        ffn=MoE(experts=shape.experts, router=router, expert=SwiGLU(hidden=shape.hidden), losses=()),
        norm_epsilon=1e-6,
    )


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


class _Peer:
    """transformers' model with our weights."""

    def __init__(self, model: Any):
        self.model = model

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        with torch.no_grad():
            return self.model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    def generate(self, prompts: np.ndarray, tokens: int) -> list[list[int]]:
        import torch  # pyright: ignore[reportMissingImports]

        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.no_grad():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        return found[:, prompts.shape[1] :].tolist()


def _transformers_model(shape: Shape, model: DecoderLM, threads: int) -> _Peer:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        rms_norm_eps=model.config.norm_epsilon,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=shape.long,
    )
    # The way to choose how experts run is an argument of this method alone.
    peer = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32).eval()
    values = dict(_named_weights(shape, model))
    peer.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    return _Peer(peer)


def _named_weights(shape: Shape, model: DecoderLM) -> Iterator[tuple[str, np.ndarray]]:
    """Our weights by transformers' names; theirs are outputs x inputs."""
    state: Any = nnx.state(model)

    def out_first(kernel: Any, inputs: int = 1) -> np.ndarray:
        array = np.asarray(kernel[...])
        return array.reshape(int(np.prod(array.shape[:inputs])), -1).T

    yield "model.embed_tokens.weight", np.asarray(state["embedding"][...])
    yield "model.norm.weight", np.asarray(state["final_norm"]["scale"][...])
    yield "lm_head.weight", out_first(state["head_kernel"])
    for number in range(shape.layers):
        layer, name = state["segments"][number]["unit"]["layers"][0], f"model.layers.{number}"
        attention, experts = layer["attention"], layer["ffn"]["experts"]
        yield f"{name}.input_layernorm.weight", np.asarray(layer["attention_norm"]["scale"][...])
        yield f"{name}.post_attention_layernorm.weight", np.asarray(layer["ffn_norm"]["scale"][...])
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            yield f"{name}.self_attn.{theirs}.weight", out_first(attention[ours])
        yield f"{name}.self_attn.o_proj.weight", out_first(attention["output"], inputs=2)
        for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield f"{name}.self_attn.{theirs}.weight", np.asarray(attention[ours]["scale"][...])
        yield f"{name}.mlp.gate.weight", out_first(layer["ffn"]["router"]["gate"]["kernel"])
        gate, up, down = (np.asarray(experts[part][...]).swapaxes(1, 2) for part in ("gate", "up", "down"))
        yield f"{name}.mlp.experts.gate_up_proj", np.concatenate([gate, up], axis=1)
        yield f"{name}.mlp.experts.down_proj", down
