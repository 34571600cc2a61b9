"""The model of the other library that `dynamoe bench generation` times has our weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.experiments.commands.generation_models import Shape, decoder, transformers_model

TINY = Shape(vocab=32, width=8, layers=1, heads=2, kv_heads=1, head_width=4, experts=4, chosen=2, hidden=4, long=64)


@pytest.mark.parity
def test_logits_are_equal() -> None:
    pytest.importorskip("transformers", reason="torch and transformers are not installed")
    model = decoder(TINY).build(jax.random.key(0), stacked=False)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab, (2, 5)).astype(np.int32)
    theirs = transformers_model(TINY, model, 1).logits(tokens)
    np.testing.assert_allclose(model(jnp.asarray(tokens)).logits, theirs, rtol=1e-4, atol=1e-4)
