"""What saving keeps and refuses. Byte-identical files: test_goldens.py; loaded by transformers: test_parity.py."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dynamoe.models.checkpoints import as_pretrained, from_pretrained, save, save_pretrained
from dynamoe.models.checkpoints.fields import Fields
from dynamoe.models.checkpoints.registry import family_of
from dynamoe.models.checkpoints.tensor_files import Outgoing, read_header, write_file

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = json.loads((FIXTURES / "llama" / "config.json").read_text())


@pytest.fixture
def model():
    fields = Fields(CONFIG)
    return family_of(fields).decoder(fields).build(jax.random.key(0))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_large_model_is_divided_and_the_division_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "LARGEST_SHARD", 3000)
    save_pretrained(as_pretrained(model, CONFIG), tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    loaded = from_pretrained(tmp_path / "first", stacked=True)
    for array, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (loaded.model, model)), strict=True):
        np.testing.assert_array_equal(array, other)
    monkeypatch.undo()
    save_pretrained(loaded, tmp_path / "second")
    assert files(tmp_path / "second") == files(tmp_path / "first")


def test_what_a_configuration_leaves_to_derive_is_the_same(model):
    attention = dataclasses.replace(model.config.attention, head_width=None)
    derived = dataclasses.replace(model.config, attention=attention).build(jax.random.key(0))
    assert as_pretrained(derived, CONFIG).dtypes == as_pretrained(model, CONFIG).dtypes


def test_unknown_fields_of_a_configuration_are_kept(model, tmp_path):
    config = {**CONFIG, "of_no_use_here": [1, {"ü": None}]}
    save_pretrained(as_pretrained(model, config), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert from_pretrained(tmp_path / "out").config == config


def test_what_is_no_weight_is_left_out_and_said(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG))
    entries = read_header(FIXTURES / "llama" / "model.safetensors").entries
    table = Outgoing("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (2,), lambda: np.ones(2, np.float32))
    kept = [Outgoing(entry.name, entry.dtype, entry.shape, entry.read) for entry in entries]
    write_file(tmp_path / "in" / "model.safetensors", [table, *kept], {})
    loaded = from_pretrained(tmp_path / "in")
    assert loaded.left_out == (table.name,)
    save_pretrained(loaded, tmp_path / "out")
    found = read_header(tmp_path / "out" / "model.safetensors").entries
    assert [entry.name for entry in found] == [entry.name for entry in entries]


def test_a_folder_that_holds_something_is_not_touched(model, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="which is there and not an empty folder"):
        save_pretrained(as_pretrained(model, CONFIG), tmp_path)
    assert files(tmp_path) == {"mine": b"keep"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 32), ("rms_norm_eps", 0.1), ("num_key_value_heads", 4), ("intermediate_size", 99)],
)
def test_a_model_that_its_configuration_does_not_describe_is_refused(field, value, model):
    with pytest.raises(ValueError, match=r"model\.config\.\w+ is .*; config describes .*: they must be the same"):
        as_pretrained(model, {**CONFIG, field: value})


def test_a_loaded_model_that_was_replaced_by_another_is_refused_before_anything_is_written(tmp_path):
    loaded = from_pretrained(FIXTURES / "llama")
    other = dataclasses.replace(loaded.model.config, layers=1).build(jax.random.key(0))
    with pytest.raises(ValueError, match=r"model\.config\.layers is 1; config describes 2"):
        save_pretrained(loaded._replace(model=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_router_that_its_configuration_does_not_describe_is_refused():
    config = json.loads((FIXTURES / "mixtral" / "config.json").read_text())
    fields = Fields(config)
    model = family_of(fields).decoder(fields).build(jax.random.key(0))
    as_pretrained(model, {**config, "router_aux_loss_coef": 0.5})
    with pytest.raises(ValueError, match=r"model\.config\.ffn is .*k=2.*; config describes .*k=3"):
        as_pretrained(model, {**config, "num_experts_per_tok": 3})


def test_a_weight_that_is_packed_here_alone_is_refused(model):
    config = json.loads((FIXTURES / "gpt_oss_packed" / "config.json").read_text())
    packed = from_pretrained(FIXTURES / "gpt_oss_packed").model
    del config["quantization_config"]
    expected = "config describes layers.0.ffn.experts.down as [3, 32, 32]; the model's is None: they must be the same"
    with pytest.raises(ValueError, match=re.escape(expected)):
        as_pretrained(packed, config)
