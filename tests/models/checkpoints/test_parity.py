"""The same model here and in transformers: logits, greedy tokens, auxiliary losses, both ways through files."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch", reason="needs torch and transformers: make test-parity")

from dynamoe.models.checkpoints import as_pretrained, from_pretrained, save_pretrained  # noqa: E402
from dynamoe.models.checkpoints.fields import Fields  # noqa: E402
from dynamoe.models.checkpoints.registry import family_of  # noqa: E402
from dynamoe.models.generation import Engine, Request  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

_SPEC = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
assert _SPEC is not None and _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

NAMES = [name for name in tiny.GOLDEN | tiny.MORE if not name.endswith("_packed")]
MIXTURES = ["mixtral", "olmoe", "qwen3_moe_every_second"]


@functools.cache
def theirs(name):
    return tiny.build(name)


@functools.cache
def ours(name, folder):
    theirs(name).save_pretrained(folder)
    return from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each name."""
    home = tmp_path_factory.mktemp("models")
    return lambda name: home / name


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens, segments, positions):
    return nnx.merge(graph, state)(tokens, segments, positions)


def run(model, tokens, mask=None, positions=None):
    mask = np.ones_like(tokens) if mask is None else mask
    positions = (
        np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape) if positions is None else positions
    )
    return forward(*nnx.split(model), tokens, jnp.asarray(mask, jnp.int32), jnp.asarray(positions, jnp.int32))


def assert_close(found, expected, where=slice(None)):
    found, expected = np.asarray(found)[where], expected[where]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_padding_and_at_long_positions_are_the_same(name, folders):
    model, tokens = ours(name, folders(name)).model, tiny.tokens(name, rows=3, length=24)
    mask = np.arange(24)[None] < np.array([24, 17, 3])[:, None]
    mask = mask.astype(np.int32)
    assert_close(run(model, tokens, mask).logits, tiny.logits(theirs(name), tokens, mask), mask > 0)
    if name == "llama_biased":
        return  # its theta depends on the longest row there, on each row here
    positions = np.arange(24, dtype=np.int32)[None] + np.array([0, 900, 4000], np.int32)[:, None]
    assert_close(run(model, tokens, None, positions).logits, tiny.logits(theirs(name), tokens, None, positions))


@pytest.mark.parametrize("name", [name for name in tiny.GOLDEN if name in NAMES and name != "llama_biased"])
def test_greedy_tokens_are_the_same(name, folders):
    prompt = tiny.tokens(name, rows=1, length=7)
    ids = tiny.torch.from_numpy(prompt).long()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs(name).generate(ids, attention_mask=tiny.torch.ones_like(ids), **options)[0, 7:].tolist()
    engine = Engine(ours(name, folders(name)).model, rows=1, slots=32)
    engine.submit(Request(prompt=tuple(prompt[0].tolist()), max_tokens=12))
    assert [drawn.token for drawn in engine.run()] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_model_born_here_is_loaded_by_transformers(name, folders, tmp_path):
    config = ours(name, folders(name)).config
    fields = Fields(config)
    model = family_of(fields).decoder(fields).build(jax.random.key(1))
    save_pretrained(as_pretrained(model, config), tmp_path / "out")
    loaded, report = type(theirs(name)).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tiny.tokens(name)
    assert_close(run(model, tokens).logits, tiny.logits(loaded.eval(), tokens))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_auxiliary_loss_is_k_times_ours(name, folders):
    tokens = tiny.tokens(name)
    with tiny.torch.no_grad():
        output = theirs(name)(tiny.torch.from_numpy(tokens).long(), output_router_logits=True)
    stats = [layer for layer in run(ours(name, folders(name)).model, tokens).stats if layer is not None]
    # Theirs is one loss of all layers together: the means over layers come before the product.
    load = np.mean([layer.load for layer in stats], axis=0)
    probs = np.mean([layer.importance for layer in stats], axis=0)
    k = theirs(name).config.num_experts_per_tok
    together = k * len(load) * (load / load.sum() * probs / probs.sum()).sum()
    np.testing.assert_allclose(together, float(output.aux_loss), rtol=1e-5)
