"""A decoder in float64, to check others by."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Exits
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.models.generation import Engine, Request, SelfSpeculationEngine

SINGLE = Decoder(
    vocab=12,
    width=16,
    layers=3,
    attention=Attention(heads=2, kv_heads=1, qk_norm=True),
    ffn=Dense(hidden=16),
    exits=Exits(after=(1,)),
    residual_scale=0.4,
)
DOUBLE = {"dtype": "float64"}


@contextlib.contextmanager
def sixty_four_bits() -> Iterator[None]:
    """Integers without a dtype are then of 64 bits too, which strict promotion would refuse beside ours."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def test_cached_decoding_agrees_with_the_forward_pass_to_float64() -> None:
    with sixty_four_bits():
        model = dataclasses.replace(SINGLE, **DOUBLE).build(jax.random.key(0), stacked=False)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 9)), jnp.int32)
        whole = model(tokens).logits
        cache = model.empty_cache(batch=2, slots=16)
        parts = []
        for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
            logits, cache = model.decode(part, cache)
            parts.append(logits)
        assert whole.dtype == jnp.float64 and cache.layers[0].keys.dtype == jnp.float64
        apart = np.abs(np.concatenate(parts, axis=1) - whole).max()
        single = np.abs(SINGLE.build(jax.random.key(0), stacked=False)(tokens).logits - whole).max()
    assert apart < 1e-13 < 1e-9 < single < 1e-4


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_drafts_change_no_greedy_answer_in_float64(threshold: float) -> None:
    with sixty_four_bits():
        model = dataclasses.replace(SINGLE, **DOUBLE).build(jax.random.key(0), stacked=False)
        drafts = SelfSpeculationEngine(model, rows=2, slots=16, tokens=3, threshold=threshold)
        answers = []
        for engine in (drafts, Engine(model, rows=2, slots=16)):
            for start in range(3):
                engine.submit(Request(prompt=(start, 5, 7), max_tokens=9))
            answers.append(sorted((drawn.request, n, drawn.token) for n, drawn in enumerate(engine.run())))
        by_request = [[(request, token) for request, _, token in each] for each in answers]
    assert by_request[0] == by_request[1] and drafts.acceptance.accepted > 0


def test_float64_needs_jax_to_know_it() -> None:
    with pytest.raises(ValueError, match="Decoder.dtype is 'float64', which JAX knows only with jax_enable_x64"):
        dataclasses.replace(SINGLE, **DOUBLE)
