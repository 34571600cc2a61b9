"""Soft mixture of experts: by hand, against loops in float64, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models import Decoder
from dynamoe.moe import FeedForwardModule, RoutingContext, SoftMoE, SwiGLU

N, S, D, F, E, C = 3, 5, 8, 4, 2, 3
MASK = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
CONFIGS = {
    "normalised": SoftMoE(experts=E, slots=C, expert=SwiGLU(hidden=F)),
    "plain": SoftMoE(experts=E, slots=C, expert=SwiGLU(hidden=F), normalize=False),
}


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (N, S, D))


@pytest.fixture(scope="module", params=CONFIGS)
def layer(request):
    built = CONFIGS[request.param].build(width=D, key=jax.random.key(1))
    if built.router.gain is not None:
        built.router.gain[...] = 3.0
    return built


@pytest.fixture(scope="module")
def run(layer):
    """The layer, compiled once: run(x, mask) -> y."""
    graph, state = nnx.split(layer)
    compiled = jax.jit(lambda x, mask: nnx.merge(graph, state)(x, RoutingContext(mask=mask))[0])
    return lambda x, mask=MASK: compiled(x, jnp.array(mask).reshape(-1))


def swiglu(experts, expert, row):
    gate, up, down = (np.asarray(w[...][expert], np.float64) for w in (experts.gate, experts.up, experts.down))
    inner = row @ gate
    return (inner / (1 + np.exp(-inner)) * (row @ up)) @ down


def loop(layer, x, mask):
    """The paper's algorithm, one sequence, slot and token after another, over the real tokens alone; float64."""
    phi = np.asarray(layer.router.phi[...], np.float64)
    x, y = np.asarray(x, np.float64), np.zeros(x.shape)
    for sequence in range(len(x)):
        real = np.flatnonzero(mask[sequence])
        if not len(real):
            continue
        tokens = x[sequence, real]
        logits = tokens @ phi
        if layer.router.gain is not None:
            logits = float(layer.router.gain[...]) * logits
            logits /= np.linalg.norm(tokens, axis=1)[:, None] * np.linalg.norm(phi, axis=0)[None]
        odds = np.exp(logits)
        outputs = np.zeros((phi.shape[1], D))
        for slot in range(phi.shape[1]):
            inside = sum(odds[t, slot] / odds[:, slot].sum() * tokens[t] for t in range(len(real)))
            outputs[slot] = swiglu(layer.experts, slot // layer.config.slots, inside)
        for place, token in enumerate(real):
            y[sequence, token] = sum(odds[place, s] / odds[place].sum() * outputs[s] for s in range(len(outputs)))
    return y


def test_equals_a_loop_over_sequences_slots_and_tokens(layer, x, run):
    np.testing.assert_allclose(run(x), loop(layer, x, MASK), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(x)[0], loop(layer, x, np.ones((N, S), bool)), rtol=1e-4, atol=1e-5)


def test_padding_outputs_zero_and_what_it_holds_changes_nothing(x, run):
    y = run(x)
    assert (np.asarray(y)[~MASK] == 0).all()
    for held in (50.0, jnp.nan):
        np.testing.assert_array_equal(run(jnp.where(jnp.array(MASK)[..., None], x, held)), y)


def test_sequences_of_a_batch_do_not_see_each_other_and_tokens_of_one_do(x, run):
    everything = np.ones((N, S), bool)
    before, after = run(x, everything), run(x.at[1, 2].multiply(-2.0), everything)
    changed = (np.asarray(before) != np.asarray(after)).any(axis=2)
    np.testing.assert_array_equal(changed, [[False] * S, [True] * S, [False] * S])


def test_permuted_tokens_give_permuted_outputs(x, run):
    everything, order = np.ones((N, S), bool), np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(run(x[:, order], everything), run(x, everything)[:, order], rtol=1e-4, atol=1e-6)


def test_batch_axes_do_not_matter(layer, x):
    y, stats = layer(x)
    assert stats is None and isinstance(layer, FeedForwardModule)
    np.testing.assert_allclose(layer(x[:, None])[0][:, 0], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x[0])[0], y[0], rtol=1e-5, atol=1e-6)


def test_by_hand():
    # D = 2, one expert with one slot: phi is (1, 0) and the gain log 3, so tokens (5, 0) and (0, 2) have cosines 1 and
    # 0, odds 3 and 1, and the slot holds (3.75, 0.5). With one slot all tokens get what the expert makes of that.
    layer = SoftMoE(experts=1, slots=1, expert=SwiGLU(hidden=F)).build(width=2, key=jax.random.key(0))
    layer.router.phi[...], layer.router.gain[...] = jnp.array([[4.0], [0.0]]), jnp.log(3.0)
    y, _ = layer(jnp.array([[5.0, 0.0], [0.0, 2.0]]))
    expected = swiglu(layer.experts, 0, np.array([3.75, 0.5]))
    np.testing.assert_allclose(y, [expected, expected], rtol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter_and_the_real_tokens(layer, x):
    graph, state = nnx.split(layer)

    # A token of zeros has no direction.
    x = x.at[0, 0].set(0.0)

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state)(x, RoutingContext(mask=jnp.array(MASK).reshape(-1)))[0]).sum()

    of_state, of_x = jax.jit(jax.grad(loss, (0, 1)))(state, x)
    for leaf in jax.tree.leaves(of_state):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4
    assert np.isfinite(of_x).all()
    np.testing.assert_array_equal(np.abs(of_x).max(axis=2) > 0, MASK)


def test_bfloat16_is_close_to_float32(layer, x):
    exact, (rough, _) = layer(x)[0], layer(x.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_the_tap_sees_the_input_and_no_routing(layer, x):
    seen = []
    layer(x, tap=lambda *call: seen.append(call))
    ((path, activations, routing),) = seen
    assert path == "ffn" and activations is x and routing is None


def test_a_causal_decoder_refuses_it_unless_its_config_allows_it():
    ffn = CONFIGS["normalised"]
    with pytest.raises(ValueError, match=r"Decoder\.ffn of layer 0 is SoftMoE\(.*, which looks at later tokens"):
        Decoder(ffn=ffn)
    assert Decoder(ffn=ffn, allow_look_ahead=True).feed_forwards[0].looks_ahead


@pytest.mark.parametrize(
    ("shape", "context", "message"),
    [
        ((2, 5, D + 1), {}, rf"x has shape \(2, 5, {D + 1}\); it must be \[\.\.\., S, {D}\]"),
        ((D,), {}, rf"x has shape \({D},\); it must be \[\.\.\., S, {D}\]"),
        ((0, 5, D), {}, r"with at least one sequence and token"),
        ((2, 5, D), {"mask": jnp.ones(9, bool)}, r"context\.mask has shape \(9,\); it must be \(10,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(shape, context, message, unchecked):
    layer = CONFIGS["normalised"].build(width=D, key=jax.random.key(1))
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape), RoutingContext(**context))


@pytest.mark.parametrize("name", ["experts", "slots"])
def test_fewer_than_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"SoftMoE\.{name} is 0; it must be at least 1"):
        SoftMoE(**{name: 0})
