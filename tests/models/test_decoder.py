"""The decoder: against a second one in float64, in both of its forms, over documents, with a cache, in bfloat16."""

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Attention, Decoder, Dense, EveryNth, FirstLayers, with_layers
from dynamoe.moe import (
    BalanceLoss,
    CapacityDispatcher,
    DenseDispatcher,
    Experts,
    FeedForward,
    Hash,
    MoE,
    MoEStats,
    Router,
    RouterLoss,
    RouterState,
    Routing,
    SwiGLU,
    TopK,
)

B, S, V = 2, 12, 24
MOE = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8), dispatcher=DenseDispatcher())  # the fastest to compile
SWITCH = MoE(experts=4, router=TopK(k=1, renormalize=False), expert=SwiGLU(hidden=8))
DENSE = Dense(hidden=24)
BASE = Decoder(vocab=V, width=16, layers=2, attention=Attention(heads=4, kv_heads=2), ffn=MOE)
PATTERNS = {
    "all": BASE,
    "every second": dataclasses.replace(BASE, layers=4, ffn=EveryNth(ffn=MOE, otherwise=DENSE)),
    "first dense": dataclasses.replace(BASE, layers=3, ffn=FirstLayers(ffn=MOE, first=DENSE)),
    "single": dataclasses.replace(BASE, layers=1),
}
every_pattern = pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)

# Row 0: a document of 5, one of 5, padding. Row 1: one document.
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * S], np.int32)
POSITIONS = np.array([[*range(5), *range(5), 0, 0], [*range(S)]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, V, (B, S), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph, state, tokens, segments, positions):
    return nnx.merge(graph, state)(tokens, segments, positions).logits


def logits(model, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS):
    return np.asarray(logits_of(*nnx.split(model), *map(jnp.asarray, (tokens, segments, positions))))


@functools.partial(jax.jit, static_argnums=0)
def everything(graph, state):
    """Gradients of a loss with the auxiliary ones, logits, statistics and taps, compiled at once."""

    def loss(state):
        output = nnx.merge(graph, state)(
            jnp.asarray(TOKENS),
            jnp.asarray(SEGMENTS),
            jnp.asarray(POSITIONS),
            tap=lambda path, activations, routing: (activations, routing),
        )
        auxiliary = sum(stats.loss for stats in output.stats if stats is not None)
        return jnp.square(output.logits).mean() + auxiliary, output

    return jax.grad(loss, has_aux=True)(state)


@functools.cache
def built(config, stacked=True):
    """A model with random numbers everywhere, also in norms; built once, so no test may change it.

    NumPy draws: compiling the package's own initialisation for every configuration would take longer than all tests.
    """
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0), stacked=False))
    draw = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        noise = draw.normal(size=variable.get_value().shape)
        value = 1 + 0.3 * noise if path[-1] == "scale" else noise if path[-1] == "embedding" else 0.3 * noise
        variable.set_value(jnp.asarray(value, jnp.float32))
    return with_layers(model, stacked=stacked)


def assert_close(some, others, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(some) == jax.tree.structure(others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), some, others)


def variables(model):
    return {
        path: (np.asarray(variable.get_value()), variable.get_metadata()["axes"])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def assert_same_model(model, other):
    model, other = variables(model), variables(other)
    assert list(model) == list(other)
    for path in model:
        np.testing.assert_array_equal(model[path][0], other[path][0])
        assert model[path][1] == other[path][1]


# The oracle.
@pytest.mark.smoke
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(BASE, attention=Attention(heads=4, kv_heads=2, qk_norm=True)),
        dataclasses.replace(BASE, tied=True, ffn=DENSE, norm_epsilon=0.1),
        dataclasses.replace(BASE, layers=3, ffn=FirstLayers(ffn=SWITCH, first=DENSE)),
    ],
    ids=["mixture with normalised heads", "tied dense", "dense, then Switch"],
)
def test_logits_equal_a_decoder_in_float64(config, reference):
    model = built(config, stacked=False)
    ours = logits(model)
    for row in range(B):
        expected = reference.decoder(model, TOKENS[row], SEGMENTS[row], POSITIONS[row])
        np.testing.assert_allclose(ours[row], expected, rtol=1e-3, atol=1e-4)


# Stacked and unstacked.
@every_pattern
def test_both_forms_hold_the_same_parameters_and_axes(config):
    stacked, separate = (config.build(jax.random.key(1), stacked=stacked) for stacked in (True, False))
    assert_same_model(with_layers(stacked, stacked=False), separate)
    assert_same_model(with_layers(separate, stacked=True), stacked)
    assert_same_model(with_layers(with_layers(stacked, stacked=False), stacked=True), stacked)
    again = with_layers(with_layers(stacked, stacked=False), stacked=True)
    assert nnx.graphdef(again) == nnx.graphdef(stacked)


@every_pattern
@pytest.mark.parametrize("form", ["stacked, remat", "unstacked"])
def test_logits_gradients_statistics_and_taps_are_the_same_in_every_form(config, form):
    gradients, output = everything(*nnx.split(built(config)))
    other = dataclasses.replace(config, remat="remat" in form)
    graph, state = nnx.split(built(other, "unstacked" not in form))
    other_gradients, other_output = everything(graph, state)
    assert_close(output, other_output)
    # As parameters of a model, gradients of one form can be brought into the other.
    as_model = with_layers(nnx.merge(nnx.graphdef(built(config)), gradients), stacked="unstacked" not in form)
    assert_close(jax.tree.leaves(nnx.state(as_model)), jax.tree.leaves(other_gradients), rtol=1e-3)


def test_an_unrolled_scan_gives_the_same_logits():
    config = PATTERNS["every second"]
    unrolled = built(dataclasses.replace(config, unroll=2))
    np.testing.assert_allclose(logits(unrolled), logits(built(config)), rtol=1e-4, atol=1e-5)


@every_pattern
def test_taps_and_statistics_name_every_layer(config):
    _, output = everything(*nnx.split(built(config)))
    names = [f"layers.{layer}.{part}" for layer in range(config.layers) for part in ("attention", "ffn")]
    assert set(output.taps) == {*names, "head"}
    for layer, ffn in enumerate(config.feed_forwards):
        activations, routing = output.taps[f"layers.{layer}.ffn"]
        assert activations.shape == (B, S, 16)
        assert (routing is None) == (output.stats[layer] is None) == (ffn is DENSE)
        if routing is not None:
            router = built(config, stacked=False).segments[layer].unit.layers[0].ffn.router
            expected = np.asarray(activations).reshape(-1, 16) @ np.asarray(router.gate.kernel[...])
            real = SEGMENTS.reshape(-1, 1) > 0  # routing sees zeros at padding
            np.testing.assert_allclose(routing.logits, np.where(real, expected, 0), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    gradients, _ = everything(*nnx.split(built(PATTERNS["first dense"])))
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6


def test_without_a_tap_nothing_is_recorded():
    model = built(PATTERNS["single"])
    assert jax.eval_shape(lambda: model(jnp.asarray(TOKENS))).taps == {}


def equations(jaxpr):
    """How often each primitive stands in a program, also inside scans and calls."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)]
    here = Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    return sum((equations(getattr(p, "jaxpr", p)) for p in inner if is_jaxpr(p)), start=here)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def forward_equations(config, *, stacked):
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0), stacked=stacked))
    graph, state = nnx.split(model)
    return equations(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(jnp.asarray(TOKENS)).logits)(state).jaxpr)


@pytest.mark.parametrize("ffn", [MOE, EveryNth(ffn=MOE, otherwise=DENSE)], ids=["all", "every second"])
def test_the_stacked_program_does_not_grow_with_depth(ffn):
    shallow, deep = (
        forward_equations(dataclasses.replace(BASE, layers=layers, ffn=ffn), stacked=True) for layers in (4, 10)
    )
    # Each layer's statistics are cut out of what the scan returns; XLA drops these cuts where nobody reads them.
    for cut in ("slice", "squeeze"):
        shallow.pop(cut), deep.pop(cut)
    assert shallow == deep and shallow["scan"] == 1


def test_the_unstacked_program_grows_with_depth():
    two, four = (forward_equations(dataclasses.replace(BASE, layers=layers), stacked=False) for layers in (2, 4))
    # Query, key, value, output, scores, values; router, gate, up, down, combine: 11 products a layer.
    assert four["dot_general"] - two["dot_general"] >= 22 and "scan" not in four


@pytest.mark.parametrize("stacked", [True, False])
def test_remat_wraps_every_layer_and_only_when_asked(stacked):
    counts = [
        sum(
            times
            for name, times in forward_equations(dataclasses.replace(BASE, remat=remat), stacked=stacked).items()
            if name in ("checkpoint", "remat", "remat2")
        )
        for remat in (False, True)
    ]
    assert counts == [0, 1 if stacked else BASE.layers]


def test_editing_a_converted_model_leaves_the_given_one_alone():
    for config in (PATTERNS["first dense"], PATTERNS["single"]):
        for stacked in (True, False):
            model = nnx.clone(built(config, stacked))
            before = variables(model)
            converted = with_layers(model, stacked=False)
            converted.segments[0].unit.layers[0].attention.query[...] *= 2
            np.testing.assert_equal(variables(model), before)


# Documents, positions, padding.
def test_a_document_does_not_see_its_neighbours():
    model, changed = built(PATTERNS["first dense"]), TOKENS.copy()
    changed[0, :5] = (changed[0, :5] + 7) % V
    before, after = logits(model), logits(model, tokens=changed)
    np.testing.assert_array_equal(before[0, 5:], after[0, 5:])
    np.testing.assert_array_equal(before[1], after[1])
    assert (np.abs(before[0, :5] - after[0, :5]).max(axis=-1) > 1e-3).all()


def test_a_packed_document_has_the_logits_of_one_alone():
    model = built(PATTERNS["first dense"])
    alone = np.zeros((B, S), np.int32)
    alone[0, :5] = TOKENS[0, 5:10]
    segments = (np.arange(S) < 5).astype(np.int32)[None] * np.array([[1], [0]], np.int32)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    np.testing.assert_allclose(
        logits(model)[0, 5:10], logits(model, alone, segments, positions)[0, :5], rtol=1e-4, atol=1e-5
    )


def test_no_token_sees_a_later_one():
    model, changed = built(PATTERNS["first dense"]), TOKENS.copy()
    changed[1, 7] = (changed[1, 7] + 1) % V
    before, after = logits(model), logits(model, tokens=changed)
    np.testing.assert_array_equal(before[1, :7], after[1, :7])
    assert (np.abs(before[1, 7:] - after[1, 7:]).max(axis=-1) > 1e-5).all()


def test_rows_with_routing_groups_of_their_own_do_not_compete_for_capacity():
    dispatcher = CapacityDispatcher(capacity_factor=0.5, routing_group=S)
    config = dataclasses.replace(BASE, ffn=dataclasses.replace(MOE, dispatcher=dispatcher))
    changed = TOKENS.copy()
    changed[0, 7] = (changed[0, 7] + 1) % V
    whole = np.ones_like(SEGMENTS), np.tile(np.arange(S, dtype=np.int32), (B, 1))
    here, there = logits(built(config), TOKENS, *whole), logits(built(config), changed, *whole)
    np.testing.assert_array_equal(here[1], there[1])
    np.testing.assert_array_equal(here[0, :7], there[0, :7])
    assert (here[0, 7:] != there[0, 7:]).any()


def test_padding_takes_no_part_in_logits_or_statistics():
    graph, state = nnx.split(built(PATTERNS["first dense"]))

    @jax.jit
    def run(tokens):
        output = nnx.merge(graph, state)(tokens, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
        return output.logits, output.stats

    changed = TOKENS.copy()
    changed[0, 10:] = (changed[0, 10:] + 5) % V
    (before, stats), (after, other_stats) = run(TOKENS), run(changed)
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    jax.tree.map(np.testing.assert_array_equal, stats, other_stats)


def test_segments_and_positions_default_to_one_document_a_row():
    model = built(PATTERNS["single"])
    explicit = logits(model, segments=np.ones_like(SEGMENTS), positions=np.broadcast_to(np.arange(S), (B, S)))
    default = jax.jit(lambda tokens: model(tokens).logits)(TOKENS)
    np.testing.assert_allclose(default, explicit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token", [-1, V, 1_000_000])
def test_a_token_outside_the_vocabulary_shows_as_nan_in_its_row_alone(token):
    tokens = TOKENS.copy()
    tokens[1, 4] = token
    result = logits(built(PATTERNS["single"]), tokens=tokens)
    assert np.isnan(result[1, 4:]).all() and np.isfinite(result[0]).all()


# The cache.
@functools.partial(jax.jit, static_argnums=0)
def decode(graph, state, tokens, cache, mask):
    return nnx.merge(graph, state).decode(tokens, cache, mask)


@pytest.mark.smoke
def test_decoding_prompts_of_two_lengths_equals_the_full_forward():
    model = built(PATTERNS["first dense"], stacked=False)
    whole = logits(model, segments=np.ones_like(SEGMENTS), positions=np.broadcast_to(np.arange(S), (B, S)))
    lengths, width = np.array([3, 7]), 8
    mask = np.arange(width)[None] < lengths[:, None]
    # What stands at padding must not matter.
    prompt = np.where(mask, TOKENS[:, :width], 5)
    graph, state = nnx.split(model)
    ours, cache = decode(graph, state, prompt, model.empty_cache(batch=B, slots=S), mask)
    np.testing.assert_array_equal(cache.length, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(ours[row, :length], whole[row, :length], rtol=1e-3, atol=1e-4)
    for step in range(5):
        here = lengths + step
        ours, cache = decode(graph, state, TOKENS[[0, 1], here][:, None], cache, np.ones((B, 1), bool))
        np.testing.assert_allclose(ours[:, 0], whole[[0, 1], here], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(cache.length, lengths + 5)
    for layer in cache.layers:
        np.testing.assert_array_equal(layer.valid, np.arange(S)[None] < (lengths + 5)[:, None])


def test_a_slot_is_invalid_in_one_layer_alone():
    model = built(PATTERNS["first dense"], stacked=False)
    graph, state = nnx.split(model)
    ones = np.ones((B, 8), bool)
    _, cache = decode(graph, state, TOKENS[:, :8], model.empty_cache(batch=B, slots=S), ones)
    skipped = cache.layers[1]._replace(valid=cache.layers[1].valid.at[0, 2].set(False))
    poisoned = skipped._replace(keys=skipped.keys.at[0, :, 2].set(3.0), values=skipped.values.at[0, :, 2].set(3.0))

    def step(layer):
        layers = (cache.layers[0], layer, cache.layers[2])
        return np.asarray(decode(graph, state, TOKENS[:, 8:9], cache._replace(layers=layers), ones[:, :1])[0])

    full, without, with_poison = step(cache.layers[1]), step(skipped), step(poisoned)
    np.testing.assert_array_equal(without, with_poison)
    np.testing.assert_array_equal(without[1], full[1])
    assert np.abs(without[0] - full[0]).max() > 1e-4


def test_decoding_a_stacked_model_is_refused():
    model = built(PATTERNS["all"])
    with pytest.raises(ValueError, match="decode needs the layers unstacked; .* use with_layers"):
        model.decode(jnp.asarray(TOKENS), model.empty_cache(batch=B, slots=S))


def test_bfloat16_has_float32_parameters_and_logits_close_to_float32():
    # All experts run, so that rounding moves no token to another one.
    ffn = MoE(experts=4, router=TopK(k=4), expert=SwiGLU(hidden=8))
    exact, rough = (dataclasses.replace(BASE, ffn=ffn, dtype=dtype) for dtype in ("float32", "bfloat16"))
    exact, model = logits(built(exact)), built(rough)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    assert model.embed(jnp.asarray(TOKENS)).dtype == jnp.bfloat16
    assert model.empty_cache(batch=1, slots=2).layers[0].keys.dtype == jnp.bfloat16
    close = logits(model)
    assert close.dtype == np.float32 and np.isfinite(close).all()
    assert 0 < np.linalg.norm(close - exact) / np.linalg.norm(exact) < 0.03


def test_bfloat16_statistics_and_gradients_are_finite_float32():
    model = built(dataclasses.replace(PATTERNS["single"], dtype="bfloat16"))
    gradients, output = everything(*nnx.split(model))
    for leaf in jax.tree.leaves((gradients, output.stats)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


# A user's own parts: nothing below is known to the package.
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
        self.experts = experts

    def __call__(self, x, context):
        expert = context.token_ids % self.experts
        probs = jax.nn.one_hot(expert, self.experts)
        real = jnp.ones(expert.shape, bool) if context.mask is None else context.mask
        return Routing(jnp.where(real, expert, self.experts), real.astype(jnp.float32), None, probs, probs), None


@dataclass(frozen=True, kw_only=True)
class OffBy(RouterLoss):
    """The share of probability that expert 0 lacks."""

    coefficient: float = 3.0

    def __call__(self, routing, context):
        return 1 - routing.probs[:, 0].mean(where=context.mask)


@dataclass(frozen=True, kw_only=True)
class Doubling(Experts):
    """Expert e doubles its rows e times."""

    def build(self, *, experts, width, key):
        return DoublingExperts(experts)


class DoublingExperts(nnx.Module):
    def __init__(self, experts):
        self.experts = experts

    def __call__(self, rows, group_sizes):
        expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
        return jnp.exp2(expert.astype(rows.dtype))[:, None] * rows


@dataclass(frozen=True, kw_only=True)
class Scale(FeedForward):
    """Multiplies by a vector that carries no logical axes, and reports noise drawn from the layer's key."""

    def build(self, *, width, key):
        return ScaleLayer(width, key)


class ScaleLayer(nnx.Module):
    def __init__(self, width, key):
        self.scale = nnx.Param(jax.random.normal(key, (width,)))

    def __call__(self, x, context=None, tap=None):
        noise = jnp.zeros(()) if context.key is None else jax.random.normal(context.key)
        nothing = jnp.zeros(1)
        zero = jnp.zeros(())
        stats = MoEStats(
            nothing, nothing, noise, noise, dropped=zero, overflow=zero, losses={}, loss=zero, router_state={}
        )
        return x * jnp.broadcast_to(self.scale[...], x.shape), stats


class Memory(nnx.Module):
    def __init__(self):
        self.seen = RouterState(jnp.zeros(()))


class CountingRouter(nnx.Module):
    """Counts the real tokens that it has seen, in a module that it holds."""

    def __init__(self, experts):
        self.experts = experts
        self.memory = Memory()

    def __call__(self, x, context):
        routing, _ = ByTokenIdRouter(self.experts)(x, context)
        return routing, {"memory.seen": self.memory.seen[...] + context.mask.astype(jnp.float32).sum()}


@dataclass(frozen=True, kw_only=True)
class Counting(ByTokenId):
    looks_ahead = True

    def build(self, *, width, experts, key):
        return CountingRouter(experts)


@functools.partial(jax.jit, static_argnums=0)
def output_of(graph, state, tokens, key):
    output = nnx.merge(graph, state)(tokens, key=key)
    return output.logits, output.stats


def test_a_users_router_loss_and_experts_work_in_training_and_in_decoding():
    config = dataclasses.replace(
        BASE, ffn=MoE(experts=4, router=ByTokenId(), expert=Doubling(), losses=(BalanceLoss(), OffBy()))
    )
    whole, statistics = output_of(*nnx.split(built(config)), TOKENS, None)
    share = np.bincount(TOKENS.ravel() % 4, minlength=4) / TOKENS.size
    for stats in statistics:
        np.testing.assert_allclose(stats.load, share, rtol=1e-6)
        # Probabilities are one-hot, so the balance loss is E times the sum of the squared shares.
        np.testing.assert_allclose(stats.loss, 0.01 * 4 * (share**2).sum() + 3 * (1 - share[0]), rtol=1e-5)
    model = built(config, stacked=False)
    ours, _ = decode(*nnx.split(model), TOKENS, model.empty_cache(batch=B, slots=S), np.ones((B, S), bool))
    np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-4)


def test_a_users_network_works_in_both_forms_and_each_layer_draws_its_own_numbers():
    config = dataclasses.replace(BASE, layers=3, ffn=EveryNth(ffn=Scale(), otherwise=Scale()))

    def run(stacked, seed):
        whole, statistics = output_of(*nnx.split(built(config, stacked)), TOKENS, jax.random.key(seed))
        return whole, [float(stats.entropy) for stats in statistics]

    (here, noise), (there, same), (_, other) = run(True, 9), run(False, 9), run(True, 10)
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    assert noise == same and len(set(noise)) == 3 and noise[0] != other[0]


COUNTING = MoE(experts=4, router=Counting(), expert=Doubling())


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("ffn", [COUNTING, EveryNth(ffn=COUNTING, otherwise=DENSE)], ids=["all", "every second"])
def test_every_layers_router_keeps_a_state_of_its_own(ffn, stacked):
    model = dataclasses.replace(BASE, layers=4, ffn=ffn, allow_look_ahead=True).build(
        jax.random.key(0), stacked=stacked
    )
    before = jax.tree.map(np.asarray, nnx.state(model, RouterState))
    stats = model(jnp.asarray(TOKENS), jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)).stats
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, RouterState))
    # Each layer's number is made its own, to see where it goes.
    numbered = [
        s and s._replace(router_state={name: value + i for name, value in s.router_state.items()})
        for i, s in enumerate(stats)
    ]
    model.update_router_states(tuple(numbered))
    layers = [layer for segment in with_layers(model, stacked=False).segments for layer in segment.unit.layers]
    real = (SEGMENTS > 0).sum()
    routers = [layer.ffn.router if ffn.at(i) == COUNTING else None for i, layer in enumerate(layers)]
    assert [router and float(router.memory.seen[...]) for router in routers] == [
        real + i if ffn.at(i) == COUNTING else None for i in range(4)
    ]


def test_a_router_that_looks_ahead_is_refused_unless_the_config_allows_it():
    with pytest.raises(
        ValueError, match=r"Decoder\.ffn of layer 1 is MoE\(.*Counting\(\).*, which looks at later tokens"
    ):
        dataclasses.replace(BASE, layers=4, ffn=EveryNth(ffn=COUNTING, otherwise=DENSE))
    assert dataclasses.replace(BASE, ffn=COUNTING, allow_look_ahead=True).feed_forwards[0].looks_ahead


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 0}, r"Decoder\.vocab is 0; it must be at least 1"),
        ({"width": 0}, r"Decoder\.width is 0; it must be at least 1"),
        ({"layers": 0}, r"Decoder\.layers is 0; it must be at least 1"),
        ({"loss_block": 0}, r"Decoder\.loss_block is 0; it must be at least 1, or None"),
        ({"unroll": 0}, r"Decoder\.unroll is 0; it must be at least 1"),
        ({"width": 30}, r"width is 30; with Attention\.heads=4 .* it must be a multiple of 8"),
        ({"norm_epsilon": -1.0}, r"Decoder\.norm_epsilon is -1\.0; it must be at least 0"),
        (
            {"ffn": MoE(router=Hash(vocab=8), losses=())},
            r"Decoder\.ffn of layer 0 knows 8 token ids, and Decoder\.vocab is",
        ),
        ({"dtype": "float16"}, r"Decoder\.dtype is 'float16'; allowed are 'float32', 'bfloat16' and 'float64'"),
    ],
)
def test_a_bad_config_is_refused(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Decoder(**arguments)
