"""Published recipes compile for their chips, a few layers at full width; what expert parallelism exchanges."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dynamoe.experiments.planning.compiled import compile_step, training_step
from dynamoe.experiments.planning.placement import place
from dynamoe.experiments.planning.published import RECIPES
from dynamoe.experiments.planning.scaling import at_scale
from dynamoe.experiments.planning.target import find_target
from dynamoe.experiments.serialization import call_recipe
from dynamoe.kernels.aot import compile_for, mesh_for
from dynamoe.models import Attention, Layout, MeshShape
from dynamoe.moe import (
    AllToAll,
    CapacityDispatcher,
    Exchange,
    ExpertParallel,
    MoE,
    RoutingContext,
    SwiGLU,
    TopK,
)

LENGTH = 1024


@pytest.fixture(autouse=True)
def mixed_dtypes():
    # JAX's own attention mixes bfloat16 with float32 inside.
    with jax.numpy_dtype_promotion("standard"):
        yield


# Compile time does not depend on depth, but on width: a TPU and a GPU here, all of them in `make nightly`. XLA's ragged
# product of Qwen3's 128 experts for v6e takes minutes.
@pytest.mark.parametrize(
    ("name", "chip", "topology", "mesh"),
    [
        ("mixtral_8x7b", "v5p", "2x2x1", MeshShape(data=1, expert=4)),
        ("olmoe_1b_7b_h100", "h100", "1x8", MeshShape(data=1, expert=8)),
    ],
)
def test_a_step_of_two_layers_at_full_width_compiles_and_fits(name, chip, topology, mesh):
    recipe = call_recipe(RECIPES / f"{name}.py")
    target = find_target(chip, topology)
    model = replace(recipe.model, layers=2, vocab=1024)
    small = replace(
        recipe, model=model, mesh=mesh, batch_size=target.devices, sequence_length=LENGTH, gradient_accumulation=1
    )
    placement = place(mesh, target)
    compiled = compile_step(training_step(small, placement), placement)
    assert compiled.refusal is None and compiled.memory is not None and compiled.report is not None
    assert compiled.memory.margin > 0
    kinds = {one.kind for one in compiled.report.collectives}
    assert "all-to-all" in kinds


def test_exchanges_bring_what_the_formula_says():
    ffn = MoE(
        experts=8,
        router=TopK(k=2),
        expert=SwiGLU(hidden=256),
        dispatcher=ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.0))),
    )
    recipe = call_recipe(RECIPES / "mixtral_8x7b.py")
    model = replace(recipe.model, vocab=512, width=256, layers=3, attention=Attention(heads=2, kv_heads=1), ffn=ffn)
    small = replace(recipe, model=model, sequence_length=512)
    scale = at_scale(small, "v5e", "2x4", MeshShape(data=1, expert=8))
    # 3 layers, 6 exchanges of 512 tokens x 2 experts x 256 numbers of 2 bytes, 7 of 8 from others
    assert scale.formula == 3 * 6 * 512 * 2 * 256 * 2 * 7 / 8
    assert abs(scale.deviation) < 0.1


def products_beside_an_exchange(exchange: Exchange, kind: str) -> list[str]:
    """The matrix products between the start of an exchange and its end, by the name of what they come from."""
    shared = MoE(
        experts=8,
        router=TopK(k=2),
        expert=SwiGLU(hidden=1024),
        shared=SwiGLU(hidden=1024),
        dispatcher=ExpertParallel(exchange=exchange),
    )
    layout = Layout(mesh_for("v5e:2x4", {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}))
    graph, state = nnx.split(nnx.eval_shape(lambda: shared.build(width=1024, key=jax.random.key(0))))
    state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        layout.shardings(state),
    )
    x = jax.ShapeDtypeStruct(
        (8, LENGTH, 1024), jnp.bfloat16, sharding=NamedSharding(layout.mesh, PartitionSpec("expert"))
    )

    def layer(state: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, RoutingContext(training=True, placement=layout))[0]

    texts: list[str] = []
    options = {f"xla_tpu_enable_async_{kind.replace('-', '_')}": "true"}
    compile_for("v5e:2x4", layer, state, x, mesh=layout.mesh, options=options, read=texts.append)
    found, open_exchanges = [], set()
    for line in texts[0][texts[0].index("ENTRY") :].splitlines():
        if start := re.search(rf"%(\S+) = .* {kind}-start\(", line):
            open_exchanges.add(start[1])
        elif done := re.search(rf" {kind}-done\(%(\S+)\)", line):
            open_exchanges.discard(done[1])
        elif open_exchanges and (product := re.search(r'op_name="([^"]*dot_general)"', line)):
            found.append(product[1])
    return found


def test_a_shared_experts_products_run_beside_the_exchange():
    products = products_beside_an_exchange(AllToAll(), "all-to-all")
    assert products and not any("shard_map" in product for product in products)
