"""A second decoder, in float64 NumPy, written from the papers' formulas: the oracle of the model tests."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx


def float64(variable):
    return np.asarray(variable[...], np.float64)


def softmax(x):
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale


def rope(x, position, theta):
    """Rotate one head [P] at one position: pair (i, i + P/2) is a complex number turned by position * theta^(-2i/P)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


def attention(layer, x, positions, segments):
    """One row [S, D], one query head and one position at a time."""
    config, (length, _) = layer.config, x.shape
    query, key, value, output = (float64(w) for w in (layer.query, layer.key, layer.value, layer.output))
    heads, group = query.shape[1], query.shape[1] // key.shape[1]

    def turned(row, kernel, norm, position):
        head = row @ kernel
        if norm is not None:
            head = rms_norm(head, float64(norm.scale), norm.epsilon)
        return rope(head, position, config.rope_theta)

    y = np.zeros_like(x)
    for h in range(heads):
        g = h // group
        keys = np.stack([turned(x[s], key[:, g], layer.key_norm, positions[s]) for s in range(length)])
        values = x @ value[:, g]
        for s in range(length):
            seen = [t for t in range(s + 1) if segments[t] == segments[s]]
            scores = keys[seen] @ turned(x[s], query[:, h], layer.query_norm, positions[s])
            y[s] += softmax(scores / np.sqrt(query.shape[2])) @ values[seen] @ output[h]
    return y


def dense(layer, x):
    gate, up, down = (float64(w) for w in (layer.gate, layer.up, layer.down))
    return (silu(x @ gate) * (x @ up)) @ down


def mixture(layer, x, mask):
    """Top-k softmax routing over SwiGLU experts, one token at a time."""
    router, kernel = layer.config.router, float64(layer.router.gate.kernel)
    gate, up, down = (float64(w) for w in (layer.experts.gate, layer.experts.up, layer.experts.down))
    y = np.zeros_like(x)
    for t in np.flatnonzero(mask):
        probs = softmax(x[t] @ kernel)
        chosen = np.argsort(-probs)[: router.k]
        weights = probs[chosen] / (probs[chosen].sum() if router.renormalize else 1.0)
        for weight, e in zip(weights, chosen, strict=True):
            y[t] += weight * ((silu(x[t] @ gate[e]) * (x[t] @ up[e])) @ down[e])
    return y


def decoder(model, tokens, segments, positions):
    """Logits [S, V] of one row; the model is unstacked."""
    config, embedding = model.config, float64(model.embedding)
    x = embedding[tokens]
    for segment in model.segments:
        block = segment.unit.layers[0]
        normed = rms_norm(x, float64(block.attention_norm.scale), config.norm_epsilon)
        x = x + attention(block.attention, normed, positions, segments)
        normed = rms_norm(x, float64(block.ffn_norm.scale), config.norm_epsilon)
        routed = hasattr(block.ffn, "router")
        x = x + (mixture(block.ffn, normed, segments > 0) if routed else dense(block.ffn, normed))
    head = embedding.T if config.tied else float64(model.head_kernel)
    return rms_norm(x, float64(model.final_norm.scale), config.norm_epsilon) @ head


@pytest.fixture(scope="session")
def reference():
    """The oracle's functions: rms_norm, rope, attention, dense, mixture, decoder."""
    return SimpleNamespace(
        rms_norm=rms_norm, rope=rope, attention=attention, dense=dense, mixture=mixture, decoder=decoder
    )


@pytest.fixture(scope="session")
def randomize():
    """`randomize(module)`: give every parameter random numbers, also norms, whose initial ones would hide mistakes."""

    def randomized(module, seed=0):
        draw = np.random.default_rng(seed)
        for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            value = variable.get_value()
            noise = draw.normal(size=value.shape).astype(value.dtype)
            variable.set_value(value + (0.3 if value.ndim == 1 else 0.1) * noise)
        return module

    return randomized
