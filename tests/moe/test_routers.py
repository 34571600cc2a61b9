"""The contract of every router: one table, all tests over it. A technique's own tests are in routers/test_*.py."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dynamoe.moe import (
    BASE,
    BalanceLoss,
    CapacityDispatcher,
    DenseDispatcher,
    EqualWeights,
    ExpertChoice,
    Experts,
    GroupLimit,
    Gumbel,
    Hash,
    Jitter,
    LearnedNoise,
    LossFree,
    MoE,
    NullExperts,
    PerSequence,
    Random,
    ReLURouting,
    Router,
    Routing,
    RoutingContext,
    Sigmoid,
    Sinkhorn,
    Softmax,
    TopK,
    TopP,
    ZLoss,
)
from dynamoe.moe.routing import assignment_counts, tokens_of

B, S, D, E = 2, 4, 8, 4
T = B * S
MASK = np.array([True, False, True, True, True, True, True, False])
EVALUATION = RoutingContext(token_ids=jnp.array([3, 1, 4, 1, 5, 9, 2, 6]), key=jax.random.key(5), sequence_length=S)
TRAINING = EVALUATION._replace(training=True)


def one(probs, assigned):
    return np.ones(T)


def probability_of_the_chosen(probs, assigned):
    return (probs * assigned).sum(axis=1)


def one_unless_all_are_null(probs, assigned):
    return assigned.any(axis=1)


class Case(NamedTuple):
    """A router and what it promises. Whether it looks ahead, its configuration says."""

    name: str
    config: Router
    total: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """What a token's weights sum to, from its probabilities and whom it is assigned to, both [T, E]. None: no word."""
    per_token: int | None = None
    """How many experts every token gets. None: it varies."""
    equivariant: bool = True
    """Whether permuted tokens get permuted assignments, in evaluation."""
    learns: bool = True
    """Whether the task's gradient reaches all of its parameters."""


def top_k(name, total=one, **options):
    config = TopK(**options)
    return Case(name, config, total, per_token=config.k)


CASES = [
    top_k("top-1", probability_of_the_chosen, k=1, renormalize=False),
    top_k("top-2", k=2),
    top_k("top-3", probability_of_the_chosen, k=3, renormalize=False),
    top_k("top-2 of sigmoids", k=2, scores=Sigmoid()),
    top_k("top-2 loss-free", k=2, scores=Sigmoid(), balancing=LossFree(rate=0.1)),
    top_k("Switch", probability_of_the_chosen, k=1, renormalize=False, noise=Jitter(amount=0.1)),
    top_k("top-2 with learned noise", k=2, noise=LearnedNoise()),
    top_k("top-2 drawn", k=2, noise=Gumbel()),
    top_k(
        "DeepSeek-V3",
        lambda probs, assigned: np.full(T, 2.5),
        k=2,
        scores=Sigmoid(),
        scale=2.5,
        balancing=LossFree(rate=0.1),
        groups=GroupLimit(groups=2, chosen=1),
    ),
    Case("top-p", TopP(p=0.6, most=3), probability_of_the_chosen),
    Case("null experts", NullExperts(k=3, null_experts=2), one_unless_all_are_null),
    Case("random", Random(k=2), one, per_token=2, equivariant=False),
    Case("expert choice", ExpertChoice(capacity_factor=2.0), probability_of_the_chosen),
    Case("expert choice in groups", ExpertChoice(capacity_factor=1.5, routing_group=3), equivariant=False),
    Case("hash", Hash(vocab=11, k=2), one, per_token=2),
    Case("Sinkhorn", Sinkhorn(k=2, scores=Softmax()), probability_of_the_chosen, per_token=2),
    Case("BASE", BASE(), per_token=1),
    Case("ReLU", ReLURouting(k=1, most=2)),
    Case("equal weights", EqualWeights(k=3), lambda probs, assigned: np.full(T, 3.0), per_token=3, learns=False),
]
every_router = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


# Expert e scales its input: enough to see gradients, and quick to compile.
@dataclass(frozen=True, kw_only=True)
class Scale(Experts):
    def build(self, *, experts, width, key):
        return ScaleExperts(experts, width)


class ScaleExperts(nnx.Module):
    def __init__(self, experts, width):
        scale = jnp.broadcast_to(jnp.arange(1.0, experts + 1)[:, None], (experts, width))
        self.scale = nnx.Param(scale, axes=("expert", "embed"))

    def __call__(self, rows, group_sizes):
        return rows * self.scale[...][:, None]


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (T, D))


def route(case, x, context) -> tuple[Routing, dict]:
    layer = layer_of(case)
    routing, state = layer.router(x, context)
    return routing, state or {}


@functools.cache
def layer_of(case):
    config = MoE(experts=E, router=case.config, expert=Scale(), dispatcher=DenseDispatcher(), losses=())
    return config.build(width=D, key=jax.random.key(3))


def table(routing):
    """How often each token is assigned to each expert, and with which weight: both [T, E]. Nobody's weight is 0."""
    token, expert = np.asarray(tokens_of(routing)), np.asarray(routing.expert)
    weight = np.asarray(routing.weight)
    assert ((expert >= 0) & (expert <= E)).all() and (weight[expert == E] == 0).all()
    assigned, weights = np.zeros((T, E + 1), int), np.zeros((T, E + 1), np.float32)
    np.add.at(assigned, (token, expert), 1)
    np.add.at(weights, (token, expert), weight)
    return assigned[:, :E], weights[:, :E]


def assert_equal(one, other, rows=slice(None)):
    for here, there in zip(table(one), table(other), strict=True):
        np.testing.assert_array_equal(here[rows], there[rows])


@functools.cache
def compiled(case):
    """The routing and the state of a compiled training step's forward pass, and its gradients."""
    graph, params, others = nnx.split(layer_of(case), nnx.Param, ...)

    def loss(params, x):
        seen = []
        y, stats = nnx.merge(graph, params, others)(x, TRAINING, tap=lambda path, x, routing: seen.append(routing))
        return jnp.square(y).sum(), (seen[0], stats.router_state)

    return jax.jit(jax.grad(loss, has_aux=True))(params, jax.random.normal(jax.random.key(1), (T, D)).reshape(B, S, D))


@every_router
def test_jit_equals_eager(case, x):
    (eager, state), (_, (jitted, jitted_state)) = route(case, x, TRAINING), compiled(case)
    assigned, weights = table(eager)
    np.testing.assert_array_equal(table(jitted)[0], assigned)
    np.testing.assert_allclose(table(jitted)[1], weights, rtol=1e-5)
    np.testing.assert_allclose(jitted.probs, eager.probs, rtol=1e-5)
    assert sorted(state) == sorted(jitted_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), dict(jitted_state), dict(state))


@every_router
def test_gradients_reach_the_router_and_the_experts_that_have_tokens(case):
    gradients, (routing, _) = compiled(case)
    for leaf in jax.tree.leaves(gradients.get("router", {})):
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 1e-4) == case.learns
    reached = np.abs(gradients["experts"]["scale"][...]).max(axis=1) > 1e-4
    np.testing.assert_array_equal(reached, np.asarray(assignment_counts(routing)) > 0)


@every_router
def test_permuted_tokens_get_permuted_assignments(case, x):
    order = np.array([3, 0, 5, 1, 7, 4, 2, 6])
    here, _ = route(case, x, EVALUATION)
    there, _ = route(case, x[order], EVALUATION._replace(token_ids=EVALUATION.token_ids[order]))
    for before, after in zip(table(here), table(there), strict=True):
        assert np.allclose(after, before[order], rtol=1e-6) == case.equivariant


@every_router
def test_padding_is_assigned_to_nobody_and_what_it_holds_changes_nothing(case, x):
    context = TRAINING._replace(mask=jnp.array(MASK))
    (routing, state), (other, other_state) = (
        route(case, jnp.where(jnp.array(MASK)[:, None], x, held), context) for held in (0.0, 50.0)
    )
    assert not table(routing)[0][~MASK].any() and table(routing)[0][MASK].any()
    assert_equal(routing, other)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


@every_router
def test_no_token_goes_to_an_expert_twice(case, x):
    for context in (EVALUATION, TRAINING):
        assigned, _ = table(route(case, x, context)[0])
        assert assigned.max() == 1
        assert case.per_token is None or (assigned.sum(axis=1) == case.per_token).all()


@every_router
def test_weights_sum_to_what_the_paper_says(case, x):
    routing, _ = route(case, x, EVALUATION)
    assigned, weights = table(routing)
    assert (weights >= 0).all()
    if case.total is not None:
        np.testing.assert_allclose(weights.sum(axis=1), case.total(np.asarray(routing.probs), assigned), rtol=1e-5)


@every_router
def test_bfloat16_activations_are_routed_in_float32(case, x):
    x = x.astype(jnp.bfloat16)
    (rough, _), (exact, _) = route(case, x, EVALUATION), route(case, x.astype(jnp.float32), EVALUATION)
    assert rough.logits.dtype == rough.probs.dtype == rough.weight.dtype == jnp.float32
    np.testing.assert_array_equal(rough.logits, exact.logits)
    assert_equal(rough, exact)


@every_router
def test_later_tokens_change_no_earlier_routing_unless_the_router_says_so(case, x):
    later = jnp.arange(T) >= 5
    ids = jnp.where(later, EVALUATION.token_ids + 1, EVALUATION.token_ids)
    seen = False
    for context in (EVALUATION, TRAINING):
        before, _ = route(case, x, context)
        for change in (-3.0, 0.0, 10.0):
            after, _ = route(case, jnp.where(later[:, None], change * x, x), context._replace(token_ids=ids))
            if case.config.looks_ahead:
                seen |= any((a[:5] != b[:5]).any() for a, b in zip(table(before), table(after), strict=True))
            else:
                assert_equal(before, after, slice(5))
    assert seen == case.config.looks_ahead


def test_assignments_are_counted_per_expert_and_nobody_is_left_out():
    routing = Routing(jnp.array([0, 2, 2, E, 3, E]), jnp.ones(6), None, jnp.zeros((3, E)), jnp.zeros((3, E)))
    np.testing.assert_array_equal(assignment_counts(routing), [1, 0, 2, 1])


def test_tokens_of_spells_out_the_token_major_order():
    def routing(token):
        return Routing(jnp.arange(6) % 3, jnp.ones(6), token, jnp.zeros((3, 4)), jnp.zeros((3, 4)))

    np.testing.assert_array_equal(tokens_of(routing(None)), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(tokens_of(routing(jnp.array([2, 1, 0, 0, 1, 2]))), [2, 1, 0, 0, 1, 2])


@every_router
def test_no_expert_gets_more_than_its_capacity_and_what_is_dropped_is_counted(case, x):
    routing, _ = route(case, x, EVALUATION)
    dispatcher = CapacityDispatcher(capacity_factor=0.5)
    plan = dispatcher.plan(routing)
    expert = np.asarray(routing.expert)
    kept = expert[np.asarray(plan.places.row) < len(plan.places.assignment)]
    places = dispatcher.capacity(tokens=T, assignments=len(expert), experts=E)
    assert np.bincount(kept, minlength=E).max() <= places and (kept < E).all()
    np.testing.assert_allclose(plan.dropped, 1 - len(kept) / (expert < E).sum(), rtol=1e-6)


@every_router
def test_the_program_is_as_long_for_many_experts(case, operations):
    def length(experts):
        router = case.config.build(width=D, experts=experts, key=jax.random.key(3))
        context = TRAINING._replace(token_ids=jnp.zeros(128, jnp.int32), sequence_length=128)
        return operations(lambda x: router(x, context)[0], jnp.ones((128, D)))

    assert length(32) == length(8)


def route_on_one_device_and_on_eight():
    """Every sequence of a batch on a device of its own: routings, statistics, losses and states stay the same."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(1), (8, S, D))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    ids = jnp.arange(8 * S, dtype=jnp.int32) % 11
    context = RoutingContext(mask=ids != 3, token_ids=ids, key=jax.random.key(5), training=True)
    for case in CASES:
        losses = () if case.name == "null experts" else (BalanceLoss(scope=PerSequence()), ZLoss())
        config = MoE(experts=E, router=case.config, expert=Scale(), dispatcher=DenseDispatcher(), losses=losses)
        graph, state = nnx.split(config.build(width=D, key=jax.random.key(3)))
        run = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x, context))
        one, eight = run(state, x), run(state, split)
        assert len(eight[0].sharding.device_set) == 8
        for here, there in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6, err_msg=case.name)


def test_routers_do_the_same_on_one_device_and_on_eight(run_with_devices):
    run_with_devices(8, route_on_one_device_and_on_eight)
