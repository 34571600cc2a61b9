"""Published models packed while loading, and packed ones saved and loaded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.compress import RoundToNearest, Rule
from dynamoe.kernels.quantized import INT8, Quantized
from dynamoe.models.checkpoints import from_pretrained, save_pretrained
from dynamoe.models.quantization import quantize_model

FIXTURES = Path(__file__).parent / "fixtures"
EXPERTS = [Rule(pattern="*.experts.*", technique=RoundToNearest(format=INT8, group_size=4))]
ATTENTION = [Rule(pattern="*.attention.query", technique=RoundToNearest(format=INT8, group_size=8))]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 5)))


def same(a, b) -> bool:
    leaves = [jax.tree.leaves_with_path(nnx.state(model)) for model in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        one[0] == other[0] and one[1].dtype == other[1].dtype and np.array_equal(one[1], other[1])
        for one, other in zip(*leaves, strict=True)
    )


@pytest.mark.parametrize(("name", "rules"), [("olmoe", EXPERTS), ("gpt_oss_packed", ATTENTION)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packing_while_loading_is_packing_afterwards(name, rules, dtype) -> None:
    expected, report = quantize_model(from_pretrained(FIXTURES / name, dtype=dtype).model, rules)
    found = from_pretrained(FIXTURES / name, dtype=dtype, quantize=rules)
    assert same(found.model, expected)
    assert found.coverage == report and report.compressed


def test_a_pattern_that_fits_nothing_is_refused_before_anything_is_read(monkeypatch) -> None:
    monkeypatch.setattr("dynamoe.models.checkpoints.load.filled", lambda *_: pytest.fail("weights were read"))
    rules = [Rule(pattern="*.nothing", technique=RoundToNearest(format=INT8))]
    with pytest.raises(ValueError, match=r"rule 0 has the pattern '\*.nothing': no path fits it"):
        from_pretrained(FIXTURES / "olmoe", quantize=rules)
    with pytest.raises(ValueError, match=r"layers.0.attention_norm.scale \[16\]: its module does not multiply"):
        from_pretrained(FIXTURES / "olmoe", quantize=[Rule(pattern="*norm.scale", technique=RoundToNearest())])
    with pytest.raises(ValueError, match="leave is .* and quantize empty"):
        from_pretrained(FIXTURES / "olmoe", leave=("*",))
    with pytest.raises(ValueError, match="quantize is given, with a layout or stacked layers"):
        from_pretrained(FIXTURES / "olmoe", quantize=EXPERTS, stacked=True)


@pytest.mark.parametrize(("name", "rules"), [("olmoe", EXPERTS), ("gpt_oss_packed", ATTENTION)])
def test_a_packed_model_comes_back_to_the_bit(name, rules, tmp_path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(FIXTURES / name, folder)
    (folder / "tokenizer.json").write_text("{}")
    packed = from_pretrained(folder, quantize=rules)
    save_pretrained(packed, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == packed.config
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    back = from_pretrained(tmp_path / "out")
    assert same(back.model, packed.model)
    np.testing.assert_array_equal(back.model(TOKENS).logits, packed.model(TOKENS).logits)
    save_pretrained(back, tmp_path / "again")
    assert same(from_pretrained(tmp_path / "again").model, packed.model)


def test_a_packed_model_loads_in_another_dtype(tmp_path) -> None:
    save_pretrained(from_pretrained(FIXTURES / "olmoe", quantize=EXPERTS), tmp_path / "out")
    narrow = from_pretrained(tmp_path / "out", dtype=jnp.bfloat16).model
    values = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(narrow))]
    assert {jnp.dtype(value.dtype) for value in values} == {jnp.dtype(jnp.bfloat16)}
    assert any(isinstance(value, Quantized) for value in values)
    assert narrow(TOKENS).logits.shape == (2, 5, 32)


def test_a_packed_folder_is_refused_where_it_is_damaged_or_asked_for_more(tmp_path) -> None:
    out = tmp_path / "out"
    save_pretrained(from_pretrained(FIXTURES / "olmoe", quantize=EXPERTS), out)
    with pytest.raises(ValueError, match="is packed already; it loads unstacked, on one device, without rules"):
        from_pretrained(out, quantize=EXPERTS)
    with pytest.raises(ValueError, match="which is there and not an empty folder"):
        save_pretrained(from_pretrained(out), out)
    file = out / "packed" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the file is damaged"):
        from_pretrained(out)
