"""`dynamoe bench packed_decoding`: one decoded token of a mixture with packed experts, against float32 weights.

Letters: B rows, E experts, D width, F hidden width, K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from ...compress import CoverageReport, RoundToNearest, Rule
from ...kernels.measuring import Call, in_turns, ratio
from ...kernels.quantized import FP8_E4M3, INT2, INT4, INT8, MXFP4, NF4, dequantize
from ...models import Attention, Decoder, DecoderLM
from ...models.quantization import packable, quantize_model
from ...moe import MoE, QuantizedWeight, SwiGLU, TopK
from ..page import Table
from ..tables import for_terminal

MODEL = Decoder(
    vocab=4096,
    width=1024,
    layers=4,
    attention=Attention(heads=16, kv_heads=4),
    ffn=MoE(experts=32, router=TopK(k=4), expert=SwiGLU(hidden=512)),
)
"""201 million parameters in experts, 25 million of them active."""
EXPERTS = "*.experts.*"
TECHNIQUES = (
    RoundToNearest(format=INT8, group_size=128),
    RoundToNearest(format=FP8_E4M3, group_size=128),
    RoundToNearest(format=INT4, group_size=128),
    RoundToNearest(format=INT4, group_size=128, zero_points=True),
    RoundToNearest(format=NF4, group_size=128),
    RoundToNearest(format=MXFP4),
    RoundToNearest(format=INT2, group_size=128),
)
ALL_LAYERS = RoundToNearest(format=INT4, group_size=128)
"""Also for attention and head."""
BATCHES = (1, 8)
PROMPT, SLOTS = 16, 512
LOGITS_ERROR = 1e-4
"""Allowed difference of a packed model's logits from those of the numbers that its weights stand for, as a part of the
largest: sums run in another order, layer upon layer."""


@dataclass
class Decoding:
    """A model in the middle of a text: each call of `step` is one token more of each of B rows."""

    model: DecoderLM
    batch: int

    def __post_init__(self):
        graph, self.state = nnx.split(self.model)
        self.run: Any = jax.jit(
            lambda state, tokens, cache: nnx.merge(graph, state).decode(tokens, cache), donate_argnums=2
        )
        # Every row a text of its own, so that rows choose experts of their own.
        draw = np.random.default_rng(0)
        self.prompt = jnp.asarray(draw.integers(0, self.model.config.vocab, (self.batch, PROMPT)), jnp.int32)
        self.logits, self.cache = self.run(self.state, self.prompt, self._empty())

    def step(self) -> jax.Array:
        """Logits of the next token, [B, 1, V]."""
        logits, self.cache = self.run(self.state, self.prompt[:, :1], self.cache)
        return logits

    def _empty(self) -> Any:
        return self.model.empty_cache(batch=self.batch, slots=SLOTS)


def bench_packed(
    rounds: int, console: Console, config: Decoder = MODEL, techniques: Sequence[RoundToNearest] = TECHNIQUES
) -> int:
    """Check every packed model's logits, then time decoding; 1 where they are wrong."""
    model = _random(config)
    packed, reports = {}, {}
    for technique in techniques:
        packed[technique.name], reports[technique.name] = quantize_model(
            model, [Rule(pattern=EXPERTS, technique=technique)]
        )
    everything = f"{ALL_LAYERS.name}, all but the embedding"
    rules = [Rule(pattern=name, technique=ALL_LAYERS) for name in packable(model) if name != "embedding"]
    packed[everything], reports[everything] = quantize_model(model, rules)
    console.print(_about(model), highlight=False)
    if not all([_right(name, model, each, console) for name, each in packed.items()]):
        return 1
    ratios: dict[int, dict[str, str]] = {}
    for batch in BATCHES:
        decoding = {name: Decoding(each, batch) for name, each in {"float32": model, **packed}.items()}
        seconds = in_turns({name: Call(each.step) for name, each in decoding.items()}, rounds)
        ours = {name: ratio(times, seconds["float32"]) for name, times in seconds.items()}
        ratios[batch] = {name: f"{of.median:.2f} ({of.fastest:.2f})" for name, of in ours.items()}
        base = float(np.median(seconds["float32"]))
        console.print(f"{batch} rows: a token of float32 takes {base * 1e3:.1f} ms", highlight=False)
    rows = [(name, *_sizes(report), *(ratios[batch][name] for batch in BATCHES)) for name, report in reports.items()]
    columns = ("packed", "bits", "bytes", "of bfloat16", "error", *(f"time, {batch} rows" for batch in BATCHES))
    caption = (
        "Of the packed parameters: bits an element with scales, bytes of all buffers, those over the bytes in "
        "bfloat16, the largest ||W - W'|| / ||W||. Time of a decoded token over that with float32 weights: the median "
        f"of {rounds} ratios in turns, and the ratio of the fastest."
    )
    console.print(for_terminal(Table(columns, rows, caption)))
    return 0


def _random(config: Decoder) -> DecoderLM:
    """Random weights, from a generator that takes seconds for so many."""
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0), stacked=False))
    draw = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.get_value().shape
        if len(shape) == 1:
            variable.set_value(jnp.ones(shape))
        else:
            # 1 / width for all is near enough: what is compared are two ways to compute with the same numbers.
            numbers = draw.standard_normal(shape, np.float32) / np.float32(config.width**0.5)
            variable.set_value(jnp.asarray(numbers))
    return model


def _about(model: DecoderLM) -> str:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    experts = sum(v.get_value().size for path, v in flat if "experts" in path)
    total = sum(v.get_value().size for _, v in flat)
    ffn = model.config.feed_forwards[0]
    return f"{total:,} parameters, {experts:,} of them in experts; {model.config.layers} layers of {ffn}"


def _right(name: str, model: DecoderLM, packed: DecoderLM, console: Console) -> bool:
    """Whether a packed model computes with the numbers that its weights stand for."""
    numbers = nnx.clone(model)
    values = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(packed, QuantizedWeight))}
    for path, variable in nnx.to_flat_state(nnx.state(numbers, nnx.Param)):
        if path in values:
            variable.set_value(dequantize(values[path]).reshape(variable.get_value().shape))
    expected, found = (np.asarray(Decoding(each, 1).logits, np.float64) for each in (numbers, packed))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    right = math.isfinite(error) and error <= LOGITS_ERROR
    allowed = "" if right else f", allowed is {LOGITS_ERROR:.0e}: nothing is timed"
    console.print(f"{name}: largest error of the logits {error:.1e}{allowed}", highlight=False)
    return right


def _sizes(report: CoverageReport) -> tuple[str, ...]:
    entries = report.compressed
    elements = sum(math.prod(entry.shape) for entry in entries)
    after = sum(entry.bytes_after for entry in entries)
    worst = max(entry.error for entry in entries)
    return f"{8 * after / elements:.3f}", f"{after:,}", f"{after / elements / 2:.3f}", f"{worst:.4f}"
