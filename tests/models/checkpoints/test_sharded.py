"""Loading onto a mesh: every array is born split, and holds what one device would."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Layout, MeshShape
from dynamoe.models.checkpoints import from_pretrained, save_pretrained

FIXTURES = Path(__file__).parent / "fixtures"


def load_on_four_devices(name, stacked, axis, out):
    """Runs in a process with four devices."""
    layout = Layout(MeshShape(**{"data": 1, "tensor": 2, axis: 2}).build())
    split = from_pretrained(FIXTURES / name, layout=layout, stacked=stacked == "stacked")
    whole = from_pretrained(FIXTURES / name, stacked=stacked == "stacked")
    found, expected = (dict(nnx.to_flat_state(nnx.state(p.model))) for p in (split, whole))
    shardings = dict(nnx.to_flat_state(layout.shardings(nnx.state(whole.model))))
    divided = 0
    for path, variable in expected.items():
        leaves = zip(*map(jax.tree.leaves, (found[path], variable, shardings[path])), strict=True)
        for array, other, sharding in leaves:
            np.testing.assert_array_equal(array, other)
            assert array.sharding.is_equivalent_to(sharding, array.ndim), path
            divided += not array.sharding.is_fully_replicated
    assert divided > 5
    tokens = np.load(FIXTURES / name / "expected.npz")["tokens"].astype(np.int32)
    logits = jax.jit(lambda model, tokens: model(tokens).logits)(split.model, jnp.asarray(tokens))
    expected_logits = np.load(FIXTURES / name / "expected.npz")["logits"]
    assert np.abs(np.asarray(logits) - expected_logits).max() < 2e-5 * np.abs(expected_logits).max()
    save_pretrained(split, out)
    assert (Path(out) / "model.safetensors").read_bytes() == (FIXTURES / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "form", "axis"), [("olmoe", "unstacked", "expert"), ("deepseek_v3", "stacked", "fsdp")]
)
def test_a_model_is_born_split_over_a_mesh_and_saved_from_there(name, form, axis, run_with_devices, tmp_path):
    run_with_devices(4, load_on_four_devices, name, form, axis, str(tmp_path / "out"))
