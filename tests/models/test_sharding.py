"""Mesh rules: what they say, what they refuse, and a model born sharded on eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dynamoe.kernels.quantized import INT4
from dynamoe.models import Attention, Decoder, EveryNth, Layout, MeshRules, MeshShape
from dynamoe.models.ffn import Dense
from dynamoe.moe import (
    BalanceLoss,
    EntropyLoss,
    GatedShared,
    ImportanceLoss,
    Latent,
    MoE,
    PerSequence,
    Residual,
    SwiGLU,
    TopK,
    ZLoss,
    quantize_experts,
)

MESH = AbstractMesh((2, 2, 1, 2), ("data", "fsdp", "expert", "tensor"))


def spec(axes, shape, rules=None):
    return (rules or MeshRules()).spec(axes, shape, MESH, "w")


def test_each_logical_axis_goes_to_its_mesh_axes(unchecked):
    assert spec(("embed", "mlp"), (4, 6)) == PartitionSpec(("fsdp",), ("tensor",))
    assert spec(("batch", None), (8, 5)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("layers", "vocab", "embed"), (3, 2, 4)) == PartitionSpec(None, ("tensor",), ("fsdp",))
    # The expert axis has one device: nothing to split.
    assert spec(("expert", "embed", "mlp"), (3, 4, 6)) == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert spec(("mlp",), (5,), MeshRules(mlp=())) == PartitionSpec(None)


@pytest.mark.parametrize(
    ("axes", "shape", "rules", "message"),
    [
        (("mlp",), (5,), {}, "axis 'mlp' of w has length 5; it must be a multiple of 2 .* mesh axes {'tensor': 2}"),
        (("batch",), (6,), {}, r"axis 'batch' of w has length 6; .* multiple of 4 .* {'data': 2, 'fsdp': 2}"),
        (("width",), (4,), {}, "w has the logical axis 'width'; known are .*'vocab'"),
        (("mlp", "embed"), (4,), {}, r"w has shape \(4,\) and logical axes .*; there must be one name per dimension"),
        (("heads", "mlp"), (4, 4), {}, r"w with logical axes .* would be split over \['tensor'\] twice"),
        (("mlp",), (4,), {"mlp": ("tensor", "tensor")}, r"would be split over \['tensor'\] twice"),
        (("mlp",), (4,), {"mlp": ("model",)}, r"MeshRules\.mlp names the mesh axis 'model'; the mesh has \['data'"),
    ],
)
def test_bad_rules_are_refused_by_name(axes, shape, rules, message, unchecked):
    with pytest.raises(ValueError, match=message):
        spec(axes, shape, MeshRules(**rules))


def test_a_packed_weight_is_split_like_its_array_and_not_through_a_group(unchecked):
    def shardings(group_size):
        def packed():
            experts = SwiGLU(hidden=12).build(experts=4, width=8, key=jax.random.key(0))
            return quantize_experts(experts, INT4, group_size=group_size)

        return Layout(MESH).shardings(nnx.state(nnx.eval_shape(packed)))

    gate = shardings(2)["gate"].get_value()
    for leaf in (gate.codes, gate.scales):
        assert leaf.spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    # D is 8 over fsdp = 2 in gate and up: 2 groups of 4, or one of 8. It is 12 over tensor = 2 in down: 3 groups of 4.
    with pytest.raises(ValueError, match=r"down has D = 12 and group_size 4, 3 groups .* split D over 2 shards"):
        shardings(4)
    with pytest.raises(ValueError, match=r"D = \d+ and group_size \d+, 1 groups .* split D over 2 shards"):
        shardings(None)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}])
def test_a_bad_mesh_shape_is_refused(sizes):
    with pytest.raises(ValueError, match="each axis must be at least 1, and at most one may be -1"):
        MeshShape(**sizes)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    message = "its fixed axes take 3 devices; 1 are there, and the product of the axes must equal that"
    with pytest.raises(ValueError, match=message):
        MeshShape(fsdp=3).build(jax.devices()[:1])


MIXTURE = MoE(
    experts=4,
    router=TopK(k=2),
    expert=SwiGLU(hidden=8),
    shared=GatedShared(expert=SwiGLU(hidden=4)),
    latent=Latent(width=8),
    residual=Residual(dense=SwiGLU(hidden=4)),
    losses=(BalanceLoss(scope=PerSequence()), ImportanceLoss(), EntropyLoss(scope=PerSequence()), ZLoss()),
)
CONFIG = Decoder(
    vocab=24,
    width=16,
    layers=4,
    attention=Attention(heads=4, kv_heads=2),
    ffn=EveryNth(ffn=MIXTURE, otherwise=Dense(hidden=24)),
)
# data 1, fsdp 2, expert 2, tensor 2: the local part of an array per logical name.
PARTS = {"embed": 2, "mlp": 2, "expert": 2, "heads": 2, "kv_heads": 2, "vocab": 2, "layers": 1, None: 1}


def check_on_eight_devices():
    """A model born sharded: its shards, its logits, its bad meshes."""
    assert jax.device_count() == 8
    mesh = MeshShape(fsdp=2, expert=2, tensor=2).build()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    layout = Layout(mesh)
    graph, _ = nnx.split(nnx.eval_shape(lambda: CONFIG.build(jax.random.key(0))))
    shapes = jax.eval_shape(lambda: nnx.state(CONFIG.build(jax.random.key(0))))

    def initial(key):
        return nnx.state(CONFIG.build(key))

    state = jax.jit(initial, out_shardings=layout.shardings(shapes))(jax.random.key(1))
    split = 0
    for path, variable in nnx.to_flat_state(state):
        array, axes = variable.get_value(), variable.get_metadata()["axes"]
        expected = tuple(length // PARTS[axis] for axis, length in zip(axes, array.shape, strict=True))
        assert array.sharding.shard_shape(array.shape) == expected, path
        assert {shard.data.shape for shard in array.addressable_shards} == {expected}, path
        split += expected != array.shape
    assert split > 15

    tokens = np.random.default_rng(0).integers(0, 24, (8, 6), np.int32)
    segments = np.broadcast_to([1, 1, 1, 2, 2, 0], (8, 6)).astype(np.int32)
    segments[3] = 0  # a sequence of padding, which losses per sequence leave out

    def forward(state, tokens, segments, layout=None):
        output = nnx.merge(graph, state)(tokens, segments, layout=layout)
        return output.logits, output.stats

    here = [jax.device_put(array, layout.batch(8, 2)) for array in (tokens, segments)]
    assert {shard.data.shape for shard in here[0].addressable_shards} == {(2, 6)}
    sharded = jax.jit(forward, static_argnums=3)(state, *here, layout)
    whole = jax.device_put(jax.tree.map(np.asarray, state), jax.devices()[0])
    single = jax.jit(forward)(whole, tokens, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded, single)

    # Rules of one's own: everything whole but the batch.
    plain = Layout(mesh, MeshRules(embed=(), mlp=(), expert=(), heads=(), kv_heads=(), vocab=()))
    for leaf in jax.tree.leaves(plain.shardings(shapes)):
        assert leaf.is_fully_replicated

    constrained = jax.jit(layout.constrain)(jnp.ones((8, 3, 2)))
    assert constrained.sharding.shard_shape((8, 3, 2)) == (2, 3, 2)
    refused(lambda: layout.batch(6, 2), "axis 'batch' of batch_size has length 6; it must be a multiple of 4")
    odd = nnx.eval_shape(lambda: nnx.state(Decoder(vocab=25, layers=1).build(jax.random.key(0))))
    refused(lambda: layout.shardings(odd), "axis 'vocab' of embedding has length 25; it must be a multiple of 2")
    refused(lambda: MeshShape(fsdp=3).build(), "its fixed axes take 3 devices; 8 are there")
    refused(lambda: MeshShape(data=2, fsdp=2).build(), "its fixed axes take 4 devices; 8 are there")


def refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.smoke
def test_a_model_is_born_sharded_with_the_logits_of_one_device(run_with_devices):
    run_with_devices(8, check_on_eight_devices)
