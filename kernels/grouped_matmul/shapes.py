"""Shapes that grouped matmuls really have, and how rows really spread over groups."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = "DYNAMOE_DATA"
"""The environment variable that names the folder of data files."""
_ROUTING = Path("moe_routing", "olmoe_mixtral_routing.npz")


class Shape(NamedTuple):
    """M, D and F of a grouped matmul."""

    rows: int
    inner: int
    width: int


EXPERTS = (Shape(4096, 512, 1024), Shape(4096, 512, 256))
"""The up projection of few wide and of many fine experts."""
EXPERT_GROUPS = (8, 32, 64, 128)
LAYERS = ((Shape(8192, 96, 32), 16), (Shape(8192, 128, 64), 8), (Shape(8192, 128, 128), 8), (Shape(8192, 64, 128), 16))
"""Products in the small mixtures of the demo, 4,096 tokens with two experts each; with the number of groups."""
DECODE_ROWS = (16, 32, 64, 128)


class Model(NamedTuple):
    """D, F, E and K of the mixture layers in a model's published configuration. F is one of gate and up, not both."""

    width: int
    hidden: int
    experts: int
    per_token: int


MODELS = {
    "Mixtral-8x7B": Model(4096, 14336, 8, 2),
    "OLMoE": Model(2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Model(2048, 768, 128, 8),
    "DeepSeek-V3": Model(7168, 2048, 256, 8),
}
PHASES = {"decode": 64, "prefill": 2048, "training": 8192}
"""Tokens of a decoding step, of a prompt, and of one device's part of a training step; M is K times as many."""


def even_sizes(rows: int, groups: int) -> np.ndarray:
    return scaled_sizes(np.ones(groups), rows)


def drawn_sizes(rows: int, groups: int) -> np.ndarray:
    """Each row in a group drawn uniformly, the same draw every time: a few tokens rarely spread evenly."""
    drawn = np.random.default_rng(0).integers(0, groups, rows)
    return np.bincount(drawn, minlength=groups).astype(np.int32)


def scaled_sizes(counts: np.ndarray | Sequence[int], rows: int) -> np.ndarray:
    """Group sizes in proportion to `counts` that sum to `rows`; what rounding leaves goes to the largest remainders."""
    shares = np.asarray(counts, np.float64) * rows / np.sum(counts)
    sizes = np.floor(shares).astype(np.int32)
    sizes[np.argsort(sizes - shares, kind="stable")[: rows - sizes.sum()]] += 1
    return sizes


def model_shape(model: str, phase: str, projection: str, divisor: int) -> Shape:
    """Of a model's "up" or "down" projection, with M, D and F divided; M is at least 1."""
    width, hidden, _, per_token = MODELS[model]
    inner, out = (width, hidden) if projection == "up" else (hidden, width)
    return Shape(max(PHASES[phase] * per_token // divisor, 1), inner // divisor, out // divisor)


def model_loads(model: str, counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Relative loads of a model's experts by name: even ones, and measured ones.

    Mixtral and OLMoE have their own counts on c4. The others get OLMoE's, resampled: its experts in order of load, read
    at as many even steps, in a drawn order. Without `counts`, the e-th of them gets 1 / e.
    """
    experts = MODELS[model].experts
    even, own = np.ones(experts), f"{model.partition('-')[0]}, c4"
    if not counts:
        return {"even": even, "skewed": 1 / np.arange(1, experts + 1)}
    if own in counts:
        return {"even": even, own: counts[own]}
    source = np.sort(counts["OLMoE, c4"])
    resampled = np.interp(np.linspace(0, len(source) - 1, experts), np.arange(len(source)), source)
    return {"even": even, "OLMoE, c4, resampled": np.random.default_rng(0).permutation(resampled)}


def routed_counts() -> dict[str, np.ndarray]:
    """Assignments per expert of OLMoE (64 experts) and Mixtral (8) on two kinds of text, in a middle layer.

    Empty where the environment variable DYNAMOE_DATA is not set.

    Raises:
        FileNotFoundError: the variable is set, and its folder does not hold the counts.
    """
    folder = os.environ.get(DATA)
    if not folder:
        return {}
    file = Path(folder) / _ROUTING
    if not file.exists():
        raise FileNotFoundError(f"{DATA} is {folder}; it has no {_ROUTING}")
    models = {"OLMoE": "olmoe", "Mixtral": "mixtral8x7b"}
    with np.load(file) as arrays:
        return {
            f"{name}, {text}": arrays[f"{key}__{text}__expert_counts"][1]
            for name, key in models.items()
            for text in ("c4", "github")
        }
