"""Dispatchers on a mesh of eight fake devices: the same outputs, statistics and gradients as on one device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.kernels.quantized import INT4
from dynamoe.models.sharding import Layout, MeshRules, MeshShape
from dynamoe.moe import (
    GELU,
    AllGather,
    AllToAll,
    BalanceLoss,
    BatchPriority,
    CapacityDispatcher,
    DenseDispatcher,
    Dispatcher,
    DroplessDispatcher,
    ExpertChoice,
    ExpertParallel,
    LossFree,
    MoE,
    MoELayer,
    RaggedAllToAll,
    RoutingContext,
    SwiGLU,
    TopK,
    ZLoss,
    quantize_experts,
)

ROWS, LENGTH, WIDTH, EXPERTS = 16, 8, 16, 8
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)]
"""data x fsdp x expert x tensor."""
TIGHT = CapacityDispatcher(capacity_factor=1.0, routing_group=LENGTH)
DISPATCHERS: dict[str, Dispatcher] = {
    "dense": DenseDispatcher(),
    "dropless": DroplessDispatcher(),
    "capacity": TIGHT,
    "capacity, best first": dataclasses.replace(TIGHT, order=BatchPriority()),
    "ragged": ExpertParallel(exchange=RaggedAllToAll(room=8.0)),
    "all-to-all": ExpertParallel(exchange=AllToAll(capacity=TIGHT)),
    "all-gather": ExpertParallel(exchange=AllGather()),
}


def mixture(dispatcher: Dispatcher, **options: Any) -> MoE:
    router = TopK(k=2, balancing=LossFree(rate=0.1))
    losses, expert = (BalanceLoss(), ZLoss()), SwiGLU(hidden=8)
    fields = {"router": router, "shared": expert, "losses": losses} | options
    return MoE(experts=EXPERTS, expert=expert, dispatcher=dispatcher, **fields)


def layout_of(shape: tuple[int, ...], rules: MeshRules = MeshRules()) -> Layout:  # noqa: B008
    return Layout(MeshShape(**dict(zip(("data", "fsdp", "expert", "tensor"), shape, strict=True))).build(), rules)


X = np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
MASK = np.arange(ROWS * LENGTH) % 7 != 3


def forward_and_backward(layer: MoELayer, layout: Layout | None, x: np.ndarray = X, mask: np.ndarray = MASK) -> Any:
    """Output, statistics, and gradients of the parameters and of x."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        context = RoutingContext(mask=jnp.asarray(mask), training=True, placement=layout)
        y, stats = nnx.merge(graph, params, rest)(x, context)
        return (y * jnp.cos(y)).sum(dtype=jnp.float32) + 10 * stats.loss, (y, stats)

    if layout is not None:
        params, rest = (jax.device_put(state, layout.shardings(state)) for state in (params, rest))
        x = jax.device_put(x, layout.batch(*x.shape[:1], 3))
    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))(params, rest, x)


def assert_equal(found: Any, wanted: Any, what: str) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=what)


def check_equality() -> None:
    for name, dispatcher in DISPATCHERS.items():
        layer = mixture(dispatcher).build(width=WIDTH, key=jax.random.key(0))
        one = forward_and_backward(layer, None)
        assert (one[1][1].dropped > 0.1) == (name in ("capacity", "capacity, best first", "all-to-all"))
        for shape in MESHES:
            found = forward_and_backward(layer, layout_of(shape))
            assert_equal(found, one, f"{name} on {shape}")


def test_every_dispatcher_gives_on_every_mesh_what_it_gives_on_one_device(run_with_devices: Callable[..., str]) -> None:
    run_with_devices(8, check_equality)


def check_statistics_are_global() -> None:
    """The statistics and the router's state of a text whose halves differ: every device holds those of the whole."""
    x = X + np.where(np.arange(ROWS) < ROWS // 2, 2.0, -2.0).astype(np.float32)[:, None, None]
    for name in ("dropless", "ragged", "all-to-all", "all-gather"):
        layer = mixture(DISPATCHERS[name]).build(width=WIDTH, key=jax.random.key(0))
        half = forward_and_backward(layer, None, x[: ROWS // 2], MASK[: len(MASK) // 2])[1][1]
        whole = forward_and_backward(layer, None, x)[1][1]
        assert np.abs(half.load - whole.load).max() > 0.05, "one device's statistics would be others"
        stats = forward_and_backward(layer, layout_of((2, 1, 4, 1)), x)[1][1]
        assert list(stats.router_state) == ["balancing.bias"]
        for leaf, wanted in zip(jax.tree.leaves(stats), jax.tree.leaves(whole), strict=True):
            assert len(leaf.addressable_shards) == 8
            for shard in leaf.addressable_shards:
                np.testing.assert_allclose(shard.data, wanted, rtol=1e-5, atol=1e-6)


def test_every_device_holds_the_statistics_and_router_state_of_the_whole_batch(
    run_with_devices: Callable[..., str],
) -> None:
    run_with_devices(8, check_statistics_are_global)


def check_overflow() -> None:
    """Room for fewer rows than come: a receiver fills up in the order of the senders, each in that of its experts."""
    layout = layout_of((1, 1, 8, 1))
    layer = mixture(ExpertParallel(exchange=RaggedAllToAll(room=0.5))).build(width=WIDTH, key=jax.random.key(0))
    (y, stats), _ = forward_and_backward(layer, layout)[::-1]
    chosen = routed(layer)  # [tokens, k], EXPERTS at padding
    room, tokens = 16, ROWS * LENGTH // 8  # 0.5 of 32 assignments of a device, one expert on each
    kept = np.zeros(chosen.shape, bool)
    for expert in range(EXPERTS):
        arriving = np.argwhere(chosen == expert)  # senders in order, and of each its tokens in order
        kept[tuple(arriving[:room].T)] = True
    lost = 1 - kept.sum() / (chosen < EXPERTS).sum()
    assert lost > 0.05 and tokens * 2 == 32
    np.testing.assert_allclose(stats.dropped, lost, rtol=1e-5)
    np.testing.assert_allclose(stats.overflow, lost, rtol=1e-5)

    dense, gradients = forward_and_backward(mixture_like(layer, DenseDispatcher()), None)[1], None
    same = np.abs(np.asarray(y) - np.asarray(dense[0])).reshape(-1, WIDTH).max(axis=1) < 1e-4
    np.testing.assert_array_equal(same, (kept | (chosen == EXPERTS)).all(axis=1))
    assert gradients is None

    failing = mixture_like(layer, ExpertParallel(exchange=RaggedAllToAll(room=0.5, fail=True)))
    (y, stats), _ = forward_and_backward(failing, layout)[::-1]
    assert np.isnan(np.asarray(y).reshape(-1, WIDTH)[MASK]).all() and stats.overflow > 0
    roomy = mixture_like(layer, ExpertParallel(exchange=RaggedAllToAll(room=8.0, fail=True)))
    (y, stats), _ = forward_and_backward(roomy, layout)[::-1]
    assert np.isfinite(y).all() and stats.overflow == 0


def mixture_like(layer: MoELayer, dispatcher: Dispatcher) -> MoELayer:
    """The same layer with another dispatcher."""
    copy = nnx.clone(layer)
    copy.config = dataclasses.replace(layer.config, dispatcher=dispatcher)
    return copy


def routed(layer: MoELayer) -> np.ndarray:
    seen = []
    layer(jnp.asarray(X), RoutingContext(mask=jnp.asarray(MASK)), lambda path, x, routing: seen.append(routing.expert))
    return np.asarray(seen[0]).reshape(-1, 2)


def test_what_a_device_has_no_room_for_is_lost_counted_and_can_fail_the_step(
    run_with_devices: Callable[..., str],
) -> None:
    run_with_devices(8, check_overflow)


def check_what_else_runs() -> None:
    """Routers that choose tokens, packed experts, experts of two matrices, bfloat16."""
    ragged, gather = DISPATCHERS["ragged"], DISPATCHERS["all-gather"]
    layout = layout_of((1, 2, 2, 2))
    chooser = ExpertChoice(capacity_factor=2.0, routing_group=LENGTH)
    for dispatcher in (ragged, gather, DroplessDispatcher()):
        layer = mixture(dispatcher, router=chooser).build(width=WIDTH, key=jax.random.key(0))
        assert_equal(forward_and_backward(layer, layout), forward_and_backward(layer, None), str(dispatcher))
    for dispatcher in (ragged, DISPATCHERS["all-to-all"], DroplessDispatcher()):
        layer = mixture(dispatcher, shared=None).build(width=WIDTH, key=jax.random.key(0))
        layer.experts = quantize_experts(layer.experts, INT4, group_size=4)
        assert_equal(forward_and_backward(layer, layout), forward_and_backward(layer, None), f"packed, {dispatcher}")
    layer = dataclasses.replace(mixture(ragged), expert=GELU(hidden=8)).build(width=WIDTH, key=jax.random.key(0))
    assert_equal(forward_and_backward(layer, layout), forward_and_backward(layer, None), "GELU")
    half = X.astype(jnp.bfloat16)
    (y, _), gradients = forward_and_backward(layer, layout, half)[::-1]
    (wanted, _), _ = forward_and_backward(layer, None, half)[::-1]
    assert y.dtype == jnp.bfloat16 and gradients[0]["experts"]["up"].get_value().dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.1)

    def refuses(message: str, layer: MoELayer, shape: tuple[int, ...], x: np.ndarray = X, **rules: Any) -> None:
        with pytest.raises(ValueError, match=message):
            forward_and_backward(layer, layout_of(shape, MeshRules(**rules)), x, MASK[: x.shape[0] * x.shape[1]])

    build = {"width": WIDTH, "key": jax.random.key(0)}
    refuses(
        "routing groups of 128 tokens; with ExpertParallel they must divide the 16 tokens of a device",
        mixture(ragged, router=ExpertChoice()).build(**build),
        (1, 1, 8, 1),
    )
    wide = ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(routing_group=12)))
    refuses(
        "routing groups of 12 tokens; it must divide the 16 tokens of a device",
        mixture(wide).build(**build),
        (1, 1, 8, 1),
    )
    layer = mixture(ragged).build(**build)
    refuses("split over the mesh axis 'expert', and the batch over .'data'", layer, (2, 1, 4, 1), batch=("data",))
    refuses("must stand last", layer, (2, 2, 2, 1), embed=("fsdp", "expert"), expert=("data",), batch=("data", "fsdp"))
    six = dataclasses.replace(mixture(ragged), experts=6).build(**build)
    refuses("axis 'expert' of .* has length 6; it must be a multiple of 4", six, (2, 1, 4, 1))


def test_other_routers_experts_and_numbers_run_and_what_cannot_is_refused(run_with_devices: Callable[..., str]) -> None:
    run_with_devices(8, check_what_else_runs)


def test_all_to_all_alone_has_one_sequence_as_its_routing_group() -> None:
    alone = mixture(ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.0))))
    layer = alone.build(width=WIDTH, key=jax.random.key(0))
    wanted = mixture_like(layer, TIGHT)
    np.testing.assert_array_equal(layer(jnp.asarray(X))[0], wanted(jnp.asarray(X))[0])


def test_room_must_be_a_multiple_of_what_a_device_sends() -> None:
    with pytest.raises(ValueError, match="RaggedAllToAll.room is 0.0; it must be above 0 and finite"):
        RaggedAllToAll(room=0.0)
    assert RaggedAllToAll(room=1.5).rows(assignments=100, devices=4) == 152
    assert RaggedAllToAll(room=9.0).rows(assignments=100, devices=4) == 400
