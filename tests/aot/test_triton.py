"""The Triton kernels compile for every GPU of the table, and ptxas finds registers for all they hold."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dynamoe.kernels import (
    Permutation,
    gather_matmul,
    grouped_matmul,
    matmul_combine,
    sort_by_expert,
    triton_call,
)
from dynamoe.kernels.aot import Report, compile_for, mesh_for
from dynamoe.kernels.chips import CHIPS
from dynamoe.kernels.grouped_matmul.shapes import MODELS, model_shape
from dynamoe.kernels.grouped_matmul.triton_kernels import calls, tiles
from dynamoe.kernels.quantized import FORMATS, INT2, INT4, INT8, Quantized, quantize, quantize_rows
from dynamoe.moe import Dispatcher, DroplessDispatcher, FusedDispatcher, MoE, SwiGLU, TopK

EVERY_GPU = pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.gpu is not None])
PASSES = ("grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw")
ROWS, GROUPS, INNER, WIDTH = 384, 8, 512, 768
PACKED = [(format, None, False) for format in FORMATS.values() if format != INT2]
PACKED += [(INT4, 64, True), (INT8, 128, False)]


def shape(*sizes: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def forward_and_backward(x: Any, w: Any, dy: jax.Array, sizes: jax.Array) -> Any:
    def product(x: Any, w: Any) -> jax.Array:
        return grouped_matmul(x, w, sizes, implementation="triton")

    if isinstance(w, Quantized):
        y, back = jax.vjp(lambda x: product(x, w), x)
    else:
        y, back = jax.vjp(product, x, w)
    return y, *back(dy)


def compiled(chip: str, rows: int, groups: int, inner: int, width: int, dtype: jax.typing.DTypeLike) -> Report:
    shapes = shape(rows, inner, dtype=dtype), shape(groups, inner, width, dtype=dtype), shape(rows, width, dtype=dtype)
    return compile_for(chip, forward_and_backward, *shapes, shape(groups, dtype=jnp.int32))


def assert_fits(report: Report, *names: str, shared: int = tiles.SHARED_BYTES[90], spilled: int = 0) -> None:
    assert tuple(kernel.name for kernel in report.kernels) == names
    for kernel in report.kernels:
        assert kernel.resources is not None, kernel.name
        assert kernel.resources.spill_bytes <= spilled, kernel
        assert 0 < kernel.resources.registers <= 255
        assert 0 < kernel.resources.shared_bytes <= shared


@EVERY_GPU
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_plain_matrices_compile(chip, dtype):
    report = compiled(chip, ROWS, GROUPS, INNER, WIDTH, dtype)
    assert_fits(report, *PASSES)
    assert report.flops == 3 * 2 * ROWS * INNER * WIDTH
    assert "registers, 0 bytes spilled" in dict(report.table())["grouped_matmul_dw"]
    # Nothing but the plan-free kernels: what XLA itself would need for a dense product is not there.
    assert report.temporary_bytes < 4096


def test_axes_that_no_tile_divides_compile():
    assert_fits(compiled("h200", 3, 5, 77, 130, jnp.float32), *PASSES)
    assert_fits(compiled("h200", 333, 3, 4100, 4100, jnp.bfloat16), *PASSES)


@pytest.mark.parametrize("model", MODELS)
def test_models_in_training_and_decoding_compile(model):
    experts = MODELS[model].experts
    for phase in ("training", "decode"):
        rows, inner, width = model_shape(model, phase, "up", 1)
        report = compiled("h200", rows, experts, inner, width, jnp.bfloat16)
        assert_fits(report, *PASSES)


@EVERY_GPU
@pytest.mark.parametrize("rows", [24, 8192])
def test_packed_matrices_compile(chip, rows):
    for format, group_size, zero_points in PACKED:

        def packed(w: jax.Array, format=format, group_size=group_size, zero_points=zero_points) -> Quantized:
            return quantize(w, format, group_size=group_size, zero_points=zero_points)

        w = jax.eval_shape(packed, shape(GROUPS, INNER, WIDTH))
        arrays = shape(rows, INNER), w, shape(rows, WIDTH), shape(GROUPS, dtype=jnp.int32)
        assert_fits(compile_for(chip, forward_and_backward, *arrays), *PASSES[:2])


@EVERY_GPU
def test_products_of_integers_compile(chip):
    w = jax.eval_shape(functools.partial(quantize, format=INT8), shape(GROUPS, INNER, WIDTH))

    def product(x: jax.Array, w: Quantized, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(quantize_rows(x), w, sizes, implementation="triton")

    arrays = shape(ROWS, INNER), w, shape(GROUPS, dtype=jnp.int32)
    assert_fits(compile_for(chip, product, *arrays), PASSES[0])


def test_a_layer_that_moves_tokens_in_its_products_copies_none_of_them():
    # OLMoE's layer at 2,048 tokens: their copy in the experts' order would be a third of the assignments' bytes.
    tokens, width, hidden, experts, chosen = 2048, *MODELS["OLMoE"]
    assignments = tokens * chosen

    def compiled_layer(dispatcher: Dispatcher, expert: SwiGLU) -> Report:
        config = MoE(experts=experts, router=TopK(k=chosen), expert=expert, dispatcher=dispatcher)
        layer = nnx.eval_shape(lambda: config.build(width=width, key=jax.random.key(0)))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        params = jax.tree.map(lambda array: shape(*array.shape), params)

        def step(params: nnx.State, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any]:
            y, back = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x)[0], params, x)
            return y, back(dy)

        return compile_for("h200", step, params, shape(tokens, width), shape(tokens, width))

    fused = compiled_layer(FusedDispatcher(implementation="triton"), SwiGLU(hidden=hidden))
    apart = compiled_layer(DroplessDispatcher(), SwiGLU(hidden=hidden, implementation="triton"))
    assert_fits(fused, *PASSES[:1] * 3, *PASSES[1:] * 3)
    assert fused.flops == apart.flops
    copy = 2 * assignments * width
    assert fused.temporary_bytes <= apart.temporary_bytes - copy


def test_on_a_mesh_each_device_multiplies_its_own_rows():
    mesh = mesh_for("h100", {"data": 2, "tensor": 2})
    by_rows, by_width = PartitionSpec("data"), PartitionSpec(None, None, "tensor")

    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        local: Callable[..., jax.Array] = jax.shard_map(
            lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation="triton"),
            mesh=mesh,
            in_specs=(by_rows, by_width, by_rows),
            out_specs=PartitionSpec("data", "tensor"),
        )
        return jnp.sum(local(x, w, sizes).astype(jnp.float32))

    def placed(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    x, w = placed(shape(ROWS, INNER), by_rows), placed(shape(GROUPS, INNER, WIDTH), by_width)
    sizes = placed(shape(2 * GROUPS, dtype=jnp.int32), by_rows)
    report = compile_for("h100", jax.value_and_grad(product, (0, 1)), x, w, sizes, mesh=mesh)
    assert_fits(report, *PASSES)
    assert report.flops == 3 * 2 * ROWS * INNER * WIDTH
    assert {("data",), ("tensor",)} <= {collective.axes for collective in report.collectives}


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="XLA assembles the kernels, and for the chip it compiles for"
)
@pytest.mark.parametrize("capability", [80, 86, 120])
def test_other_cards_have_tiles_that_spill_next_to_nothing(capability, monkeypatch):
    # The program is an H100's, its kernels are the other card's: nothing assembles those here but the report.
    for module in (triton_call, calls, tiles):
        monkeypatch.setattr(module, "capability", lambda: capability)

    def passes(*arrays: Any) -> Any:
        return forward_and_backward(*arrays)  # of its own, or JAX would take what it traced for another card

    sizes, shared = shape(GROUPS, dtype=jnp.int32), tiles.SHARED_BYTES[capability]
    few = 64  # with registers left ptxas spills some bytes by itself, so that more programs fit
    for rows in (24, 8192):
        for dtype in (jnp.bfloat16, jnp.float32):
            parts = ((rows, INNER), (GROUPS, INNER, WIDTH), (rows, WIDTH))
            report = compile_for("h100", passes, *(shape(*part, dtype=dtype) for part in parts), sizes)
            assert_fits(report, *PASSES, shared=shared, spilled=few)
        for format in (INT8, INT4):
            w = jax.eval_shape(functools.partial(quantize, format=format), shape(GROUPS, INNER, WIDTH))
            report = compile_for("h100", passes, shape(rows, INNER), w, shape(rows, WIDTH), sizes)
            assert_fits(report, *PASSES[:2], shared=shared, spilled=few)


def test_kernels_of_one_name_are_told_apart():
    def two(small: jax.Array, w: jax.Array, big: jax.Array, v: jax.Array, sizes: jax.Array) -> Any:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return grouped_matmul(x, w, sizes, implementation="triton")

        return jax.jit(product)(small, w), product(big, v), jax.jit(product)(small, w)

    arrays = shape(24, 64), shape(GROUPS, 64, 64), shape(8192, INNER), shape(GROUPS, INNER, WIDTH)
    report = compile_for("h200", two, *arrays, shape(GROUPS, dtype=jnp.int32))
    first, second, third = (kernel.resources for kernel in report.kernels)
    assert first is not None and second is not None
    assert first == third and first.shared_bytes < second.shared_bytes


def test_moved_tokens_compile_under_every_transformation():
    places = jax.eval_shape(lambda expert: sort_by_expert(expert, GROUPS), shape(ROWS, dtype=jnp.int32))
    up, down = shape(GROUPS, INNER, WIDTH), shape(GROUPS, WIDTH, INNER)

    def layer(x: jax.Array, up: jax.Array, down: jax.Array, weight: jax.Array, places: Permutation) -> jax.Array:
        rows = gather_matmul(x, up, places, implementation="triton")
        y = matmul_combine(rows, down, weight, places, tokens=x.shape[0], implementation="triton")
        return x + y.astype(x.dtype)

    def scanned(x: jax.Array, up: jax.Array, down: jax.Array, weight: jax.Array, places: Permutation) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.checkpoint(layer)(x, up, down, weight, places), None

        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0].astype(jnp.float32))

    def mapped(x: jax.Array, *others: Any) -> jax.Array:
        return jnp.sum(jax.vmap(lambda x: layer(x, *others))(jnp.stack([x, x])).astype(jnp.float32))

    for function in (scanned, mapped):
        arrays = shape(ROWS // 2, INNER), up, down, shape(ROWS, dtype=jnp.float32), places
        report = compile_for("h200", jax.grad(function, (0, 1, 2, 3)), *arrays)
        assert {kernel.name for kernel in report.kernels} == set(PASSES)
