"""Shapes that token permutations really have, from the models' published configurations."""

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """E, K and D of a model's mixture layers."""

    experts: int
    per_token: int
    width: int


MODELS = {
    "Mixtral-8x7B": Shape(8, 2, 4096),
    "OLMoE": Shape(64, 8, 2048),
    "Qwen3-30B-A3B": Shape(128, 8, 2048),
    "DeepSeek-V3": Shape(256, 8, 7168),
}
SORTED, MOVED = (32_768, 512), 4096
"""Assignments: a training batch's and a decoding step's to sort; some to move."""


def drawn_experts(shape: Shape, assignments: int) -> np.ndarray:
    """K different experts for each token, drawn uniformly, the same draw every time; each 16th token is padding."""
    tokens = assignments // shape.per_token
    order = np.argsort(np.random.default_rng(0).random((tokens, shape.experts)), axis=1)
    chosen = order[:, : shape.per_token]
    chosen[15::16] = shape.experts
    return chosen.reshape(-1).astype(np.int32)
