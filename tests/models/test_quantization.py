"""A model with packed weights does what the model does that has the numbers they stand for."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.compress import RoundToNearest, Rule
from dynamoe.kernels.quantized import INT4, INT8, dequantize
from dynamoe.models import Attention, Decoder, Dense, FirstLayers, Layout, MeshShape, with_layers
from dynamoe.models.generation import Engine, Request
from dynamoe.models.quantization import packable, parameter_names, quantize_model
from dynamoe.models.quantized_files import DESCRIPTION, WEIGHTS, load_quantized, save_quantized
from dynamoe.moe import DenseDispatcher, Latent, LossFree, MoE, QuantizedWeight, SwiGLU, TopK

MIXTURE = MoE(
    experts=4,
    router=TopK(k=2, balancing=LossFree()),
    expert=SwiGLU(hidden=8),
    shared=SwiGLU(hidden=8),
    latent=Latent(width=8),
    dispatcher=DenseDispatcher(),
)
CONFIG = Decoder(
    vocab=24,
    width=16,
    layers=3,
    attention=Attention(heads=4, kv_heads=2),
    ffn=FirstLayers(first=Dense(hidden=8), ffn=MIXTURE),
    tied=True,
)
RULES = [Rule(pattern="embedding", technique=RoundToNearest(format=INT8, group_size=8))]
RULES += [
    Rule(pattern=f"*.{part}", technique=RoundToNearest(format=INT4, group_size=4))
    for part in ("attention.[qkvo]*[yet]", "experts.*", "shared.*", "ffn.[gud]*")
]
LEAVE = ("*norm*", "*.latent.*", "*.router.*")
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])


def with_the_packed_numbers(model, packed):
    """The model with the numbers that the packed one's weights stand for."""
    numbers = nnx.clone(model)
    values = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(packed, QuantizedWeight))}
    for path, variable in nnx.to_flat_state(nnx.state(numbers, nnx.Param)):
        if path in values:
            dense = dequantize(values[path])
            variable.set_value((dense.T if path == ("embedding",) else dense).reshape(variable.get_value().shape))
    return numbers, len(values)


@pytest.fixture(scope="module")
def models():
    """Stacked or not: the model, its packed twin, the report."""
    stacked = nnx.eval_shape(lambda: CONFIG.build(jax.random.key(0)))
    noise = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_value(jnp.asarray(0.3 * noise.normal(size=variable.get_value().shape), jnp.float32))
    models = {form: with_layers(stacked, stacked=form) for form in (True, False)}
    return {form: (model, *quantize_model(model, RULES, leave=LEAVE)) for form, model in models.items()}


def logits(model):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(TOKENS).logits)(state)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_packed_model_equals_the_numbers_that_its_weights_stand_for(models, stacked):
    model, packed, report = models[stacked]
    numbers, count = with_the_packed_numbers(model, packed)
    assert count == len(report.compressed) == {True: 1 + 7 + 10, False: 1 + 7 + 2 * 10}[stacked]
    np.testing.assert_allclose(logits(packed), logits(numbers), rtol=2e-4, atol=2e-4)
    assert np.abs(logits(packed) - logits(model)).max() > 1e-2


def test_a_packed_model_can_be_unstacked_and_stacked(models):
    unstacked = with_layers(models[True][1], stacked=False)
    for (path, found), (_, expected) in zip(
        nnx.to_flat_state(nnx.state(unstacked)), nnx.to_flat_state(nnx.state(models[False][1])), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, found.get_value(), expected.get_value())
        assert found.get_metadata() == expected.get_metadata(), path
    stacked = nnx.state(with_layers(unstacked, stacked=True))
    jax.tree.map(np.testing.assert_array_equal, stacked, nnx.state(models[True][1]))


def test_the_report_tells_every_parameter_by_the_number_of_its_layer(models):
    model, _, report = models[False]
    assert [entry.path for entry in report.entries] == parameter_names(model)
    by_path = {entry.path: entry for entry in report.entries}
    assert by_path["layers.1.ffn.latent.down"].technique is None
    output = by_path["layers.2.attention.output"]
    assert (output.technique, output.shape) == ("int4, groups of 4", (16, 16))
    assert output.bytes_after == 16 * 16 // 2 + 4 * 16 * 4
    packed = [entry.path for entry in report.compressed]
    assert set(packed) == set(packable(model))


def test_what_no_packed_product_multiplies_is_refused_with_all_the_rest(models):
    with pytest.raises(ValueError) as caught:
        quantize_model(models[False][0], [Rule(pattern="*", technique=RoundToNearest(group_size=8))])
    for name in ("layers.1.ffn.router.gate.kernel", "layers.2.ffn.latent.up", "layers.0.ffn_norm.scale", "final_norm"):
        assert f"- {name}" in str(caught.value)
    assert "layers.1.ffn.latent.down [16, 8]: its module does not multiply with packed weights" in str(caught.value)
    assert "- layers.0.ffn.gate" not in str(caught.value)


def test_a_saved_model_is_the_same_and_generates_the_same(models, tmp_path):
    for stacked, (_, packed, _) in models.items():
        path = tmp_path / str(stacked)
        save_quantized(packed, path)
        loaded = load_quantized(path, CONFIG)
        assert nnx.graphdef(loaded) == nnx.graphdef(packed)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(packed))
        assert not list(tmp_path.glob(".*"))
    engines = [Engine(model, rows=1, slots=8) for model in (loaded, packed)]
    for engine in engines:
        engine.submit(Request(prompt=(1, 2, 3), max_tokens=4))
    drawn = [[drawn.token for drawn in engine.run()] for engine in engines]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
    with pytest.raises(ValueError, match="it is there already"):
        save_quantized(packed, path)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def reseal(folder: Path, data: bytes) -> None:
    """Other bytes, with the checksum that they have: as somebody would who means harm."""
    (folder / WEIGHTS).write_bytes(data)
    description = json.loads((folder / DESCRIPTION).read_text())
    description |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / DESCRIPTION).write_text(json.dumps(description))


DAMAGES = {
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "weights.json is missing"),
    "no JSON": (lambda folder: (folder / DESCRIPTION).write_text("{"), "it is no JSON, the file is damaged"),
    "a later version": (lambda folder: change(folder / DESCRIPTION, '"version": 1', '"version": 2'), "reads version 1"),
    "another kind": (
        lambda folder: change(folder / DESCRIPTION, '"bytes": ', '"bytes": "" , "b": '),
        "no bytes of type int",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "weights.safetensors: no such file"),
    "a flipped bit": (flip_a_bit, "its checksum is not that of weights.json"),
    "cut off": (lambda folder: (folder / WEIGHTS).write_bytes(b"123"), "has 3 bytes; weights.json says"),
    "a huge header": (lambda folder: reseal(folder, b"\xff" * 7 + b"\x0f{}"), "weights.safetensors cannot be read"),
    "an unknown format": (
        lambda folder: change(folder / DESCRIPTION, '"int8 group_size', '"int9 group_size'),
        "the description of 'embedding' is 'int9 group_size=8",
    ),
    "other groups": (
        lambda folder: change(folder / DESCRIPTION, 'embedding": "int8 group_size=8', 'embedding": "int8 group_size=4'),
        "embedding.scales is",
    ),
    "no groups": (
        lambda folder: change(folder / DESCRIPTION, "group_size=8", "group_size=0"),
        "in groups of 0; it must",
    ),
}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_quantized(models[False][1], folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(saved, tmp_path, damage):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        load_quantized(folder, CONFIG)
    assert message in str(caught.value)


def test_weights_of_another_model_are_listed(saved):
    other = dataclasses.replace(CONFIG, width=24, tied=False)
    with pytest.raises(ValueError) as caught:
        load_quantized(saved, other)
    for line in (
        "head_kernel is missing",
        "embedding is packed float32[16, 24]; the model has float32[24, 24]",
        "final_norm.scale is float32[16]; the model has float32[24]",
    ):
        assert f"\n- {line}" in str(caught.value)


def check_packed_model_on_a_mesh() -> None:
    layout = Layout(MeshShape(data=1, fsdp=2, expert=2, tensor=2).build())
    model, _ = quantize_model(CONFIG.build(jax.random.key(0)), RULES, leave=LEAVE)
    graph, state = nnx.split(model)
    tokens = jnp.concatenate([TOKENS, TOKENS])
    whole = jax.jit(lambda state: nnx.merge(graph, state)(tokens).logits)(state)
    split = jax.device_put(state, layout.shardings(state))
    kernel = split["segments"][0]["unit"]["layers"][0]["attention"]["query"].get_value()
    assert [leaf.sharding.shard_shape(leaf.shape) for leaf in (kernel.codes, kernel.scales)] == [(4, 8), (2, 8)]
    spread = jax.jit(lambda state: nnx.merge(graph, state)(tokens, layout=layout).logits)(split)
    np.testing.assert_allclose(spread, whole, rtol=1e-4, atol=1e-5)
    print("equal")


def test_a_packed_model_spread_over_a_mesh_gives_the_same(run_with_devices):
    assert run_with_devices(8, check_packed_model_on_a_mesh) == "equal\n"
