"""Every family against logits that transformers computed, kept in fixtures/ (tiny_models.py), and back to its files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models.checkpoints import from_pretrained, save_pretrained

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
every_family = pytest.mark.parametrize("name", NAMES)
PROMPT = 9
"""Tokens that are decoded at once; then one at a time."""


@functools.cache
def expected(name):
    arrays = np.load(FIXTURES / name / "expected.npz")
    return arrays["tokens"].astype(np.int32), arrays["logits"]


@functools.cache
def loaded(name):
    """An unstacked model in float32; no test changes it."""
    return from_pretrained(FIXTURES / name)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens).logits


@functools.partial(jax.jit, static_argnums=0)
def decode(graph, state, tokens, cache, mask):
    return nnx.merge(graph, state).decode(tokens, cache, mask)


def assert_close(ours, theirs, tolerance=2e-5):
    """Relative to the largest logit, and the same greedy tokens."""
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()
    np.testing.assert_array_equal(np.argmax(ours, axis=-1), np.argmax(theirs, axis=-1))


@every_family
def test_logits_are_those_of_transformers(name):
    tokens, logits = expected(name)
    assert_close(np.asarray(forward(*nnx.split(loaded(name).model), tokens)), logits)


@every_family
def test_decoding_with_a_padded_prompt_and_a_cache_gives_the_same_logits(name):
    tokens, logits = expected(name)
    model = loaded(name).model
    graph, state = nnx.split(model)
    if name == "llama_biased":  # past 16 tokens its theta grows, and keys in the cache keep their turn
        tokens = tokens[:, :16]
        logits = np.asarray(forward(graph, state, tokens))
    cache = model.empty_cache(batch=2, slots=32)
    prompt = np.pad(tokens[:, :PROMPT], ((0, 0), (0, 7)), constant_values=3)
    real = np.broadcast_to(np.arange(PROMPT + 7) < PROMPT, prompt.shape)
    found, cache = decode(graph, state, prompt, cache, real)
    parts = [found[:, :PROMPT]]
    for step in range(PROMPT, tokens.shape[1]):
        found, cache = decode(graph, state, tokens[:, step : step + 1], cache, np.ones((2, 1), bool))
        parts.append(found)
    assert_close(np.concatenate(parts, axis=1), logits)


@every_family
def test_saving_gives_the_files_back_byte_by_byte(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    source = FIXTURES / name
    pretrained = loaded(name)._replace(files=(tmp_path / "tokenizer.json",))
    save_pretrained(pretrained, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["llama", "granite_moe", "deepseek_v3", "gpt_oss_packed"])
def test_a_stacked_model_is_the_same_and_saves_the_same(name, tmp_path):
    stacked = from_pretrained(FIXTURES / name, stacked=True)
    assert len(stacked.model.segments) == (2 if name == "deepseek_v3" else 1) < stacked.model.config.layers
    tokens, logits = expected(name)
    assert_close(np.asarray(forward(*nnx.split(stacked.model), tokens)), logits)
    save_pretrained(stacked, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (FIXTURES / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt_oss_packed"])
def test_bfloat16_is_close_and_runs_under_strict_promotion(name, tmp_path):
    pretrained = from_pretrained(FIXTURES / name, dtype=jnp.bfloat16)
    for path, variable in nnx.to_flat_state(nnx.state(pretrained.model, nnx.Param)):
        assert variable.get_value().dtype == jnp.bfloat16, path
    tokens, logits = expected(name)
    ours = np.asarray(forward(*nnx.split(pretrained.model), tokens))
    assert ours.dtype == np.float32
    assert np.mean(np.abs(ours - logits)) < 0.02 * np.abs(logits).max()
    save_pretrained(pretrained, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (FIXTURES / name / "model.safetensors").read_bytes()


def test_packed_experts_stay_packed():
    experts = loaded("gpt_oss_packed").model.segments[0].unit.layers[0].ffn.experts
    assert experts.gate[...].format.name == "mxfp4"
    assert experts.gate[...].nbytes * 8 / experts.gate[...].size == 4.25
