"""What a broken or strange folder is answered; and that no folder, however mutated, does more than be refused."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dynamoe.models.checkpoints import load
from dynamoe.models.checkpoints.load import from_pretrained
from dynamoe.models.checkpoints.tensor_files import Outgoing, read_header, write_file

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny OLMoE to break."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURES / "olmoe" / name, tmp_path / name)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    """Reading a weight, or building a model, would be too late for every refusal here."""

    def fail(*arguments):
        raise AssertionError("the folder was accepted")

    monkeypatch.setattr(load, "filled", fail)


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(kept))


def rewrite(folder, change):
    """Write the tensors again, `change`d in a dict from names to (dtype, array)."""
    path = folder / "model.safetensors"
    tensors = {entry.name: (entry.dtype, entry.read()) for entry in read_header(path).entries}
    change(tensors)
    write_file(path, [Outgoing(n, d, a.shape, lambda a=a: a) for n, (d, a) in tensors.items()], {})


def test_all_wrong_tensors_stand_in_one_error(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = ("F32", np.zeros(2, np.float32))
        tensors["lm_head.weight"] = ("F32", np.zeros((3, 16), np.float32))
        tensors["model.embed_tokens.weight"] = ("I32", np.zeros((32, 16), np.int32))

    rewrite(folder, change)
    with pytest.raises(ValueError, match="nothing is loaded") as error:
        from_pretrained(folder)
    for line in (
        "model.norm.weight is missing",
        "extra.weight is not part of the model",
        "lm_head.weight has shape [3, 16]; it must be [32, 16]",
        "model.embed_tokens.weight has dtype I32; allowed are",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtrall"}, "model_type is 'mixtrall', which is unknown; the nearest are mixtral"),
        ({"model_type": "left out", "architectures": ["LlamaForCausalML"]}, "the nearest are LlamaForCausalLM"),
        ({"model_type": "left out", "architectures": 3}, "model_type is 'None', which is unknown"),
        ({"hidden_size": "left out"}, "has no hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True; it must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; the files hold .* tensors, too few"),
        ({"num_experts": 10**9}, "nothing is loaded"),
        (
            {"vocab_size": 10**15},
            r"model.embed_tokens.weight has shape \[32, 16\]; it must be \[1000000000000000, 16\]",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; what is built here needs 'silu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"num_attention_heads": 3}, "kv_heads is 2; it must divide heads=3"),
        ({"num_attention_heads": 6}, "width is 16; with Attention.heads=6"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1.0; it must be above 1"),
        ({"num_experts_per_tok": 9}, "which sends a token to 9 experts; MoE.experts is 4"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; known are default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters has no factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8'"),
    ],
)
def test_a_configuration_that_is_not_built_here_is_refused_by_the_name_of_its_field(changes, message, folder):
    set_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "place", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", "sub/x.safetensors", "x.bin"]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(place, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(ValueError, match="allowed are names of .safetensors files that lie beside it"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(name, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / name
    shutil.move(folder / name, outside)
    os.symlink(outside, folder / name)
    with pytest.raises(ValueError, match="outside of the folder; it is not read"):
        from_pretrained(folder)


def test_the_hubs_cache_may_link_to_its_blobs(folder, monkeypatch):
    snapshot, blobs = folder / "models--a--b/snapshots/123", folder / "models--a--b/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, blobs / f"hash-of-{name}")
        os.symlink(f"../../blobs/hash-of-{name}", snapshot / name)
    with pytest.raises(AssertionError, match="the folder was accepted"):
        from_pretrained(snapshot)


def test_pickles_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin .* a pickle is not read, for loading one runs whatever"):
        from_pretrained(folder)


def test_the_hub_is_asked_for_what_is_no_local_path_alone(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(folder))
    for path in (folder, "organisation/name"):
        with pytest.raises(AssertionError, match="the folder was accepted"):
            from_pretrained(path)
    for path in ("./organisation/name", "/organisation/name", "a/b/c", "name"):
        with pytest.raises(ValueError, match="there is no such folder"):
            from_pretrained(path)
    assert asked == ["organisation/name"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        from_pretrained(tmp_path / "nothing")


def test_an_index_must_say_where_tensors_are(folder):
    save_file({"a": np.zeros(2)}, folder / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="says that 'a' is in model.safetensors; it is not"):
        from_pretrained(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    save_file({"model.norm.weight": np.zeros(2)}, folder / "more.safetensors")
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "b": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'model.norm.weight' stands in model.safetensors and in more.safetensors"):
        from_pretrained(folder)


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**30,
    0.5,
    -1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [10**9],
    {},
    {"a": 1},
]


@given(seed=st.integers(0, 2**32), family=st.sampled_from(sorted(path.name for path in FIXTURES.iterdir())))
def test_a_mutated_folder_is_accepted_or_refused_and_nothing_else(seed, family):
    """Ten mutations of each drawn folder, in its configuration and in the bytes of its file."""
    draw = random.Random(seed)
    data, text = (FIXTURES / family / "model.safetensors").read_bytes(), (FIXTURES / family / "config.json").read_text()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for _ in range(10):
            (folder / "model.safetensors").write_bytes(mutated_bytes(data, draw) if draw.random() < 0.5 else data)
            (folder / "config.json").write_text(json.dumps(mutated_config(json.loads(text), draw)))
            try:
                from_pretrained(folder)
            except (ValueError, OSError):
                pass
            except AssertionError as error:
                assert str(error) == "the folder was accepted"


def mutated_bytes(data, draw):
    data = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.choice([1, 1, 3, 30])):
        kind, at = draw.randrange(4), draw.randrange(header)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[draw.randrange(len(data)) :]
            data += bytes(draw.choice([0, 9]))
        elif kind == 2:  # another number somewhere in the header
            digits = [i for i in range(8, min(header, len(data))) if 48 <= data[i] <= 57]
            if digits:
                data[draw.choice(digits)] = draw.choice(b"0123456789")
        else:
            data[at:at] = bytes(data[at : at + draw.randrange(1, 40)])
        if len(data) < 16:
            break
        header = min(header, len(data))
    return bytes(data)


def mutated_config(config, draw):
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        name = draw.choice(sorted(config))
        if isinstance(config[name], dict) and config[name] and draw.random() < 0.7:
            config[name] = {**config[name], draw.choice(sorted(config[name])): draw.choice(VALUES)}
        elif draw.random() < 0.2:
            del config[name]
            break
        else:
            config[name] = draw.choice(VALUES)
    return config
