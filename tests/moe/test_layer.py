"""The whole layer against a loop over tokens, its contract, and parts that a user brings along."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Int

from dynamoe.moe import (
    BalanceLoss,
    CapacityDispatcher,
    DenseDispatcher,
    Dispatcher,
    DroplessDispatcher,
    Experts,
    MoE,
    Router,
    RouterLoss,
    RouterState,
    Routing,
    RoutingContext,
    Sigmoid,
    SwiGLU,
    TopK,
    ZLoss,
)
from dynamoe.moe.routing import NO_CONTEXT, tokens_of

B, S, D, F, E = 2, 5, 8, 12, 4
MASK = np.arange(B * S) % 4 != 2


# What a user may write: nothing below is known to the package.
@dataclass(frozen=True, kw_only=True)
class ByTokenId(Router):
    """Sends token id i to expert i mod E."""

    @property
    def experts_per_token(self):
        return 1.0

    def build(self, *, width, experts, key):
        return ByTokenIdRouter(experts)


class ByTokenIdRouter(nnx.Module):
    def __init__(self, experts):
        self.gain = nnx.Param(jnp.ones(()))
        self.experts = experts

    def __call__(self, x, context):
        chosen = context.token_ids % self.experts
        real = jnp.ones(chosen.shape, bool) if context.mask is None else context.mask
        probs = jax.nn.one_hot(chosen, self.experts)
        expert = jnp.where(real, chosen, self.experts)
        return Routing(expert, jnp.where(real, self.gain[...], 0.0), None, probs, probs), None


@dataclass(frozen=True, kw_only=True)
class Largest(RouterLoss):
    """The largest logit."""

    coefficient: float = 0.5

    def __call__(self, routing, context):
        return routing.logits.max()


@dataclass(frozen=True, kw_only=True)
class Linear(Experts):
    """Expert e multiplies by e + 1."""

    def build(self, *, experts, width, key):
        return LinearExperts(experts, width)


class LinearExperts(nnx.Module):
    def __init__(self, experts, width):
        scale = jnp.broadcast_to(jnp.arange(1.0, experts + 1)[:, None], (experts, width))
        self.scale = nnx.Param(scale, axes=("expert", "embed"))

    def __call__(self, rows, group_sizes):
        if group_sizes is None:
            return rows * self.scale[...][:, None]
        expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
        return rows * self.scale[...].at[expert].get(mode="fill", fill_value=0)


class SortedPlan(NamedTuple):
    token: Int[Array, " A"]
    weight: jax.Array
    group_sizes: Int[Array, " E"]
    dropped: jax.Array
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sorted(Dispatcher):
    """Assignments sorted by expert."""

    def plan(self, routing, context=None):
        order, tokens = jnp.argsort(routing.expert), routing.logits.shape[0]
        sizes = jnp.zeros(routing.logits.shape[1], jnp.int32).at[routing.expert].add(1, mode="drop")
        return SortedPlan(tokens_of(routing)[order], routing.weight[order], sizes, jnp.zeros(()), tokens)

    def dispatch(self, x, plan):
        return x[plan.token]

    def combine(self, rows, plan):
        weighted = rows * plan.weight.astype(rows.dtype)[:, None]
        return jnp.zeros((plan.tokens, rows.shape[1]), rows.dtype).at[plan.token].add(weighted)


CONFIGS = [
    MoE(experts=E, router=TopK(k=2), expert=SwiGLU(hidden=F), dispatcher=DenseDispatcher()),
    MoE(experts=E, router=TopK(k=1, renormalize=False), expert=SwiGLU(hidden=F), dispatcher=Sorted()),
    MoE(experts=E, router=TopK(k=E, renormalize=False), expert=SwiGLU(hidden=F), losses=()),
    MoE(
        experts=E,
        router=TopK(k=2, scores=Sigmoid()),
        expert=SwiGLU(hidden=F),
        dispatcher=CapacityDispatcher(capacity_factor=E / 2),
        shared=SwiGLU(hidden=2 * F),
        losses=(BalanceLoss(), ZLoss()),
    ),
]
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=["top-2 dense", "top-1 sorted", "top-E dropless", "sigmoid capacity shared"]
)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (B, S, D))


@pytest.fixture(scope="module")
def run():
    """Layers by configuration, compiled once: run(config, x, mask) -> y, stats."""
    compiled = {}

    def call(config, x, mask=MASK):
        if config not in compiled:
            graph, state = nnx.split(config.build(width=D, key=jax.random.key(1)))

            def forward(state, x, mask):
                return nnx.merge(graph, state)(x, RoutingContext(mask=mask))

            compiled[config] = jax.jit(forward), state
        forward, state = compiled[config]
        return forward(state, x, jnp.array(mask))

    return call


def swiglu(experts, expert, row):
    gate, up, down = (np.asarray(w[...][expert], np.float64) for w in (experts.gate, experts.up, experts.down))
    inner = row @ gate
    return (inner / (1 + np.exp(-inner)) * (row @ up)) @ down


def loop(layer, x, mask):
    """A mixture of experts as the papers write it: for each token, scores, the k best, a weighted sum; float64."""
    router = layer.config.router
    tokens = np.asarray(x, np.float64).reshape(-1, D)
    kernel = np.asarray(layer.router.gate.kernel[...], np.float64)
    y = np.zeros_like(tokens)
    for t, row in enumerate(tokens):
        if not mask[t]:
            continue
        exponentials = np.exp(row @ kernel)
        sigmoid = isinstance(router.scores, Sigmoid)
        scores = exponentials / (1 + exponentials) if sigmoid else exponentials / exponentials.sum()
        chosen = np.argsort(-scores)[: router.k]
        total = scores[chosen].sum() if router.renormalize else 1.0
        y[t] = sum(scores[e] / total * swiglu(layer.experts, e, row) for e in chosen)
        if layer.shared is not None:
            y[t] += swiglu(layer.shared, 0, row)
    return y.reshape(x.shape)


@pytest.mark.smoke
@every_config
def test_layer_equals_a_loop_over_tokens(config, x, run):
    layer = config.build(width=D, key=jax.random.key(1))
    np.testing.assert_allclose(run(config, x)[0], loop(layer, x, MASK), rtol=1e-4, atol=1e-5)


def test_jit_equals_eager_and_a_call_leaves_the_layer_as_it_was(x, run):
    layer = CONFIGS[0].build(width=D, key=jax.random.key(1))
    before = jax.tree.map(np.asarray, nnx.state(layer))
    (y, stats), (jitted, jitted_stats) = layer(x, RoutingContext(mask=jnp.array(MASK))), run(CONFIGS[0], x)
    np.testing.assert_allclose(jitted, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jitted_stats, stats)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer))


@every_config
def test_padding_outputs_zero_and_what_it_holds_changes_nothing(config, x, run):
    padding = jnp.array(~MASK).reshape(B, S, 1)
    (y, stats), *others = run(config, x), *(run(config, jnp.where(padding, held, x)) for held in (50.0, jnp.nan))
    assert (np.asarray(y).reshape(-1, D)[~MASK] == 0).all()
    for other, other_stats in others:
        np.testing.assert_array_equal(y, other)
        jax.tree.map(np.testing.assert_array_equal, stats, other_stats)


@every_config
def test_permuted_tokens_give_permuted_outputs_and_equal_statistics(config, x, run):
    order = np.random.default_rng(0).permutation(B * S)
    y, stats = run(config, x)
    permuted, permuted_stats = run(config, x.reshape(-1, D)[order].reshape(x.shape), MASK[order])
    np.testing.assert_allclose(permuted.reshape(-1, D), y.reshape(-1, D)[order], rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), stats, permuted_stats)


def test_batch_axes_do_not_matter(x):
    layer = CONFIGS[0].build(width=D, key=jax.random.key(1))
    flat, _ = layer(x.reshape(-1, D))
    for shape in [(B, S, D), (B, 1, S, D)]:
        np.testing.assert_allclose(layer(x.reshape(shape))[0], flat.reshape(shape), rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_gradients_reach_every_parameter_and_the_input(x):
    graph, state = nnx.split(CONFIGS[0].build(width=D, key=jax.random.key(1)))

    @jax.jit
    def gradients(state, x):
        def loss(state, x):
            y, stats = nnx.merge(graph, state)(x, NO_CONTEXT)
            return jnp.square(y).sum() + stats.loss

        return jax.grad(loss, (0, 1))(state, x)

    for leaf in jax.tree.leaves(gradients(state, x)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4


def test_bfloat16_layer_is_close_to_float32_and_measures_in_float32(x, run):
    config = CONFIGS[2]  # all experts, so that rounding moves no token to another expert
    (exact, _), (rough, stats) = run(config, x), run(config, x.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16 and stats.load.dtype == stats.entropy.dtype == jnp.float32
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_tap_sees_the_input_and_the_routing_once(x):
    seen = []
    CONFIGS[0].build(width=D, key=jax.random.key(1))(x, tap=lambda *call: seen.append(call))
    ((path, activations, routing),) = seen
    assert path == "ffn" and activations is x
    assert routing.expert.shape == (B * S * 2,) and routing.probs.shape == (B * S, E)


def test_a_users_router_loss_and_experts_make_a_layer(x):
    config = MoE(experts=E, router=ByTokenId(), expert=Linear(), losses=(BalanceLoss(), Largest()))
    ids = jnp.arange(B * S, dtype=jnp.int32) % 7
    y, stats = config.build(width=D, key=jax.random.key(1))(x, RoutingContext(mask=jnp.array(MASK), token_ids=ids))
    # Token t goes to expert ids[t] mod E, which multiplies by that number plus one.
    factor = np.where(MASK, np.asarray(ids) % E + 1, 0)
    np.testing.assert_allclose(y.reshape(-1, D), np.asarray(x).reshape(-1, D) * factor[:, None], rtol=1e-6)
    assert stats.losses["Largest"] == 1  # logits are one-hot
    np.testing.assert_allclose(stats.loss, 0.01 * stats.losses["BalanceLoss"] + 0.5, rtol=1e-5)


def test_active_fraction_is_experts_per_token_over_experts():
    assert MoE(experts=8, router=TopK(k=2)).active_fraction == 0.25
    assert MoE(experts=8, router=ByTokenId()).active_fraction == 0.125


def test_fewer_than_one_expert_is_refused():
    with pytest.raises(ValueError, match=r"MoE\.experts is 0; it must be at least 1"):
        MoE(experts=0)


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(
        ValueError, match=r"TopK\(k=3.* sends a token to 3 experts; MoE\.experts is 2: it must be at least"
    ):
        MoE(experts=2, router=TopK(k=3))


def test_two_losses_of_one_class_are_refused():
    with pytest.raises(ValueError, match=r"MoE\.losses holds \['BalanceLoss', 'BalanceLoss'\]; each class may"):
        MoE(losses=(BalanceLoss(), BalanceLoss(coefficient=0.1)))


# A router that counts the real tokens it has seen, and sends the next to the expert of that number.
class CountingRouter(nnx.Module):
    def __init__(self, name="seen"):
        self.name = name
        self.seen = RouterState(jnp.zeros((), jnp.int32))

    def __call__(self, x, context):
        expert = jnp.broadcast_to(self.seen[...] % E, x.shape[:1])
        probs = jax.nn.one_hot(expert, E)
        routing = Routing(expert, jnp.ones(x.shape[0]), None, probs, probs)
        return routing, {self.name: self.seen[...] + x.shape[0]} if context.training else None


@pytest.fixture
def counting(key):
    layer = MoE(experts=E, expert=SwiGLU(hidden=F)).build(width=D, key=key)
    layer.router = CountingRouter()
    return layer


def test_a_routers_state_changes_when_it_is_stored_and_not_before(counting, x):
    flat = x.reshape(-1, D)[:6]
    training = RoutingContext(training=True)
    _, stats = counting(flat, training)
    assert stats.load[0] == 1 and counting.router.seen[...] == 0
    counting.update_router_state(stats.router_state)
    assert counting.router.seen[...] == 6
    _, stats = counting(flat, training)
    assert stats.load[6 % E] == 1 and stats.router_state["seen"] == 12
    assert counting(flat)[1].router_state == {}


def test_a_routers_state_is_not_a_parameter(counting):
    assert (
        "seen" not in nnx.state(counting, nnx.Param)["router"] if "router" in nnx.state(counting, nnx.Param) else True
    )
    assert list(nnx.state(counting, RouterState)["router"]) == ["seen"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "bias",
            jnp.zeros((), jnp.int32),
            r"CountingRouter returned a new value of 'bias'; its RouterState .* \['seen'\]",
        ),
        ("seen", jnp.zeros(2, jnp.int32), r"CountingRouter\.seen is to become int32\[2\]; it must stay int32\[\]"),
        ("seen", jnp.zeros(()), r"CountingRouter\.seen is to become float32\[\]; it must stay int32\[\]"),
    ],
)
def test_a_state_that_the_router_does_not_have_is_refused(counting, name, value, message):
    with pytest.raises(ValueError, match=message):
        counting.update_router_state({name: value})


def test_a_new_state_is_checked_in_the_call_that_makes_it(counting, x):
    counting.router.name = "bias"
    with pytest.raises(ValueError, match=r"CountingRouter returned a new value of 'bias'"):
        counting(x, RoutingContext(training=True))


def test_what_the_capacity_drops_is_in_the_statistics(x):
    # 10 tokens, one expert each, ceil(0.5 * 10 / 4) = 2 places per expert.
    config = MoE(
        experts=E,
        router=TopK(k=1, renormalize=False),
        expert=SwiGLU(hidden=F),
        dispatcher=CapacityDispatcher(capacity_factor=0.5),
    )
    y, stats = config.build(width=D, key=jax.random.key(1))(x)
    count = np.round(np.asarray(stats.load) * B * S)
    dropped = np.maximum(count - 2, 0).sum()
    assert dropped > 0
    np.testing.assert_allclose(stats.dropped, dropped / (B * S), rtol=1e-6)
    assert (np.abs(y).max(axis=-1) == 0).sum() == dropped


def test_a_layer_looks_ahead_where_its_router_does():
    @dataclass(frozen=True, kw_only=True)
    class Ahead(TopK):
        looks_ahead = True

    @dataclass(frozen=True, kw_only=True)
    class AheadDispatcher(CapacityDispatcher):
        looks_ahead = True

    assert MoE(experts=E, router=Ahead()).looks_ahead and not MoE(experts=E).looks_ahead
    assert MoE(experts=E, dispatcher=AheadDispatcher()).looks_ahead


@pytest.mark.parametrize(
    ("shape", "context", "message"),
    [
        ((2, 5, D + 1), {}, rf"x has shape \(2, 5, {D + 1}\); it must be \[\.\.\., {D}\], with at least one token"),
        ((0, D), {}, r"with at least one token"),
        ((2, 5, D), {"mask": jnp.ones((2, 5), bool)}, r"context\.mask has shape \(2, 5\); it must be \(10,\)"),
        ((2, 5, D), {"mask": jnp.ones(9, bool)}, r"context\.mask has shape \(9,\); it must be \(10,\)"),
        ((2, 5, D), {"token_ids": jnp.ones(5, jnp.int32)}, r"context\.token_ids has shape \(5,\); it must be \(10,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(shape, context, message, unchecked):
    layer = MoE(experts=E, expert=SwiGLU(hidden=F)).build(width=D, key=jax.random.key(1))
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape), RoutingContext(**context))


@pytest.mark.parametrize(
    "dispatcher", [DenseDispatcher(), DroplessDispatcher(), CapacityDispatcher(capacity_factor=4.0)]
)
def test_an_expert_that_does_not_exist_is_nobody(dispatcher, key):
    layer = MoE(experts=E, expert=SwiGLU(hidden=F), dispatcher=dispatcher, losses=()).build(width=D, key=key)

    def send(*experts):
        def router(x, context):
            nothing = jnp.zeros((len(x), E))
            return Routing(jnp.array(experts, jnp.int32), jnp.ones(4), None, nothing, nothing), None

        return router

    x = jax.random.normal(key, (4, D))
    layer.router = send(0, E, 3, 2)
    expected, _ = layer(x)
    for stranger in (-1, E + 5):
        layer.router = send(0, stranger, 3, 2)
        np.testing.assert_array_equal(layer(x)[0], expected)


@pytest.mark.parametrize("dispatcher", [DroplessDispatcher(), CapacityDispatcher()])
def test_the_program_of_a_layer_and_its_gradient_is_as_long_for_many_experts_and_choices(dispatcher, operations):
    def length(experts, k):
        config = MoE(experts=experts, router=TopK(k=k), expert=SwiGLU(hidden=F), dispatcher=dispatcher)
        graph, params, rest = nnx.split(config.build(width=D, key=jax.random.key(1)), nnx.Param, ...)

        def loss(params, x):
            y, stats = nnx.merge(graph, params, rest)(x)
            return y.sum() + stats.loss

        # 4,096 tokens: few assignments would be sorted another way than many.
        return operations(jax.grad(loss), params, jnp.ones((4096, D)))

    assert length(64, 8) == length(8, 2)
