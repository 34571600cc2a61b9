"""Which grouped matmuls are measured here, over which kinds of numbers. Letters: M rows, D inner width, F output, E."""

import os
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from .operands import Numbers, numbers_here
from .shapes import (
    DATA,
    DECODE_ROWS,
    EXPERT_GROUPS,
    EXPERTS,
    LAYERS,
    MODELS,
    PHASES,
    Shape,
    drawn_sizes,
    even_sizes,
    model_loads,
    model_shape,
    routed_counts,
    scaled_sizes,
)

Kind = Literal["experts", "layer", "decode", "models"]
PASSES = ("forward", "dx", "dw")
CPU_DIVISOR = 8
"""On CPU the M, D and F of models are divided by this."""
BYTES_PER_ELEMENT = 16
"""Of x, w and y in a case, about: in the numbers of every contender, their gradients, and what they are checked by."""


class Case(NamedTuple):
    """One grouped matmul."""

    kind: Kind
    shape: Shape
    spread: str
    """How the rows spread over the groups."""
    sizes: np.ndarray
    model: str = ""
    """With what M, D and F are divided by."""
    phase: str = ""
    projection: str = ""

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:1] if self.kind == "decode" or self.phase in ("decode", "prefill") else PASSES

    @property
    def decodes(self) -> bool:
        """Whether reading the matrices is what takes the time."""
        return "decode" in (self.kind, self.phase)

    @property
    def flops(self) -> float:
        """Of one pass."""
        return 2 * float(self.shape.inner * self.shape.width) * float(self.sizes.sum())

    @property
    def bytes_needed(self) -> float:
        rows, inner, width = self.shape
        return BYTES_PER_ELEMENT * (float(rows) * (inner + width) + float(len(self.sizes)) * inner * width)

    def numbers(self, which: str) -> tuple[Numbers, ...]:
        """What a pass is measured over: packed weights where they are read more than used, integers in inference."""
        kinds = numbers_here()
        floats = tuple(numbers for numbers in kinds if numbers.weights is None)
        if self.kind == "models" and jax.default_backend() != "cpu":
            floats = floats[:1]  # at full size one kind is enough
        if which != "forward" or self.kind == "layer" or self.phase == "training":
            return floats
        return tuple(numbers for numbers in kinds if self.decodes or numbers in floats or numbers.integer_rows)

    def __str__(self) -> str:
        """Kind, model, phase, projection, M x D x F, E, spread."""
        named = (self.kind, self.model, self.phase, self.projection)
        words = (*named, "x".join(map(str, self.shape)), str(len(self.sizes)), self.spread)
        return " ".join(word for word in words if word)


def cases(quick: bool, kinds: Sequence[Kind] = (), model: str | None = None) -> tuple[list[Case], list[str]]:
    """What is measured, and what a reader might miss in it, and why.

    Args:
        quick: some of it.
        kinds: of these kinds; empty: of all.
        model: among "models", of this one; None: of all.
    """
    counts = routed_counts()
    all_kinds = {"experts": _experts, "layer": _layers, "decode": _decode, "models": _models}
    found = [case for kind, make in all_kinds.items() if kind in (kinds or all_kinds) for case in make(quick, counts)]
    if model is not None:
        found = [case for case in found if case.kind != "models" or case.model.split(" / ")[0] == model]
    notes = []
    if not counts and any(case.kind in ("experts", "models") for case in found):
        notes.append(
            f"{DATA} is not set: the rows with counts of OLMoE and Mixtral are left out; models have loads 1 / e"
        )
    if divided := {case.model for case in found if " / " in case.model}:
        notes.append(f"M, D and F of models are divided by {CPU_DIVISOR} on CPU: {', '.join(sorted(divided))}")
        if not (kinds or model):
            found = [case for case in found if _by_default_on_cpu(case)]
            notes.append("of models, prefill and down projections are left out; --cases models has them")
    memory = memory_bytes()
    notes += [
        f"{case} is left out: it needs about {case.bytes_needed / 1e9:.1f} GB, {memory / 1e9:.1f} GB are there"
        for case in found
        if case.bytes_needed > memory
    ]
    return [case for case in found if case.bytes_needed <= memory], notes


def _by_default_on_cpu(case: Case) -> bool:
    """Not what costs minutes and shows little: dx of the up projection is a product of the down projection's shape."""
    return case.phase != "prefill" and case.projection != "down"


def memory_bytes() -> float:
    """Of the device, or on CPU half of the machine's."""
    if jax.default_backend() != "cpu":
        return float((jax.devices()[0].memory_stats() or {}).get("bytes_limit", "inf"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _experts(quick: bool, counts: dict[str, np.ndarray]) -> Iterator[Case]:
    for shape in EXPERTS[1:] if quick else EXPERTS:
        for groups in EXPERT_GROUPS[1:2] if quick else EXPERT_GROUPS:
            yield Case("experts", shape, "even", even_sizes(shape.rows, groups))
        for name, count in counts.items():
            yield Case("experts", shape, name, scaled_sizes(count, shape.rows))


def _layers(quick: bool, counts: dict[str, np.ndarray]) -> Iterator[Case]:
    for shape, groups in LAYERS[:1] if quick else LAYERS:
        yield Case("layer", shape, "even", even_sizes(shape.rows, groups))
        yield Case("layer", shape, "skewed", scaled_sizes(1 / (1 + np.arange(groups)), shape.rows))


def _decode(quick: bool, counts: dict[str, np.ndarray]) -> Iterator[Case]:
    for _, inner, width in EXPERTS[1:] if quick else EXPERTS:
        for groups in EXPERT_GROUPS[1:2] if quick else EXPERT_GROUPS:
            for rows in DECODE_ROWS[::3] if quick else DECODE_ROWS:
                yield Case("decode", Shape(rows, inner, width), "drawn", drawn_sizes(rows, groups))


def _models(quick: bool, counts: dict[str, np.ndarray]) -> Iterator[Case]:
    divisor = CPU_DIVISOR if jax.default_backend() == "cpu" else 1
    for model in list(MODELS)[1:2] if quick else MODELS:
        name = model if divisor == 1 else f"{model} / {divisor}"
        for projection in ("up",) if quick else ("up", "down"):
            for phase in PHASES:
                shape = model_shape(model, phase, projection, divisor)
                for spread, loads in model_loads(model, counts).items():
                    yield Case("models", shape, spread, scaled_sizes(loads, shape.rows), name, phase, projection)
