"""What stands beside the routed experts: gated shared, latent and residual networks, and experts cut finer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.kernels.flops import count_flops
from dynamoe.models import Attention, Decoder
from dynamoe.models.accounting import count_parts
from dynamoe.moe import (
    GELU,
    DenseDispatcher,
    GatedShared,
    Latent,
    MoE,
    Residual,
    RoutingContext,
    SwiGLU,
    TopK,
    fine_grained,
)

T, D, W, F, E = 6, 8, 4, 12, 4
MASK = np.arange(T) != 2
BASE = MoE(experts=E, router=TopK(k=2), expert=SwiGLU(hidden=F), dispatcher=DenseDispatcher())
OPTIONS = {
    "shared": GatedShared(expert=SwiGLU(hidden=6)),
    "latent": Latent(width=W),
    "residual": Residual(dense=SwiGLU(hidden=10)),
}
ALL = dataclasses.replace(BASE, **OPTIONS)


def float64(variable):
    return np.asarray(variable[...], np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(experts, expert, row):
    gate, up, down = (float64(w)[expert] for w in (experts.gate, experts.up, experts.down))
    inner = row @ gate
    return (inner * sigmoid(inner) * (row @ up)) @ down


def loop(layer, x):
    """One token after another: the routed experts, then what the layer has beside them; float64."""
    y = np.zeros((T, D))
    for t in np.flatnonzero(MASK):
        row = np.asarray(x[t], np.float64)
        probs = np.exp(row @ float64(layer.router.gate.kernel))
        chosen = np.argsort(-probs)[:2]
        total = (probs[chosen] if layer.config.router.renormalize else probs).sum()
        inner = row if layer.latent is None else row @ float64(layer.latent.down)
        outputs = [swiglu(layer.experts, e, inner) for e in chosen]
        if layer.latent is not None:
            outputs = [output @ float64(layer.latent.up) for output in outputs]
        y[t] = sum(probs[e] / total * output for e, output in zip(chosen, outputs, strict=True))
        if layer.shared is not None:
            y[t] += sigmoid(row @ float64(layer.shared.gate)[0]) * swiglu(layer.shared.expert, 0, row)
        if layer.residual is not None:
            exponentials = np.exp(row @ float64(layer.residual.kernel) + float64(layer.residual.bias))
            first, second = exponentials / exponentials.sum()
            y[t] = first * y[t] + second * swiglu(layer.residual.dense, 0, row)
    return y


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (T, D))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "config",
    [ALL, dataclasses.replace(BASE, latent=OPTIONS["latent"], router=TopK(k=2, renormalize=False))],
    ids=["all", "latent"],
)
def test_layer_equals_a_loop_over_tokens_and_gradients_reach_every_parameter(config, x):
    layer = config.build(width=D, key=jax.random.key(1))
    if layer.residual is not None:
        layer.residual.bias[...] = jnp.array([0.5, -1.0])
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        def loss(state):
            y, stats = nnx.merge(graph, state)(x, RoutingContext(mask=jnp.array(MASK)))
            return jnp.square(y).sum() + stats.loss, y

        return jax.grad(loss, has_aux=True)(state)

    gradients, y = run(state, jnp.where(MASK[:, None], x, jnp.nan))
    np.testing.assert_allclose(y, loop(layer, x), rtol=1e-4, atol=1e-5)
    assert (np.asarray(y)[~MASK] == 0).all()
    for path, variable in nnx.to_flat_state(gradients):
        gradient, axes = variable.get_value(), variable.get_metadata()["axes"]
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4, path
        assert len(axes) == gradient.ndim, path


def test_gated_shared_by_hand():
    shared = GatedShared(expert=GELU(hidden=1)).build(experts=1, width=1, key=jax.random.key(0))
    for weight, number in ((shared.expert.up, 1.0), (shared.expert.down, 3.0), (shared.gate, np.log(3.0))):
        weight[...] = jnp.full((1, 1, 1), number, jnp.float32)
    # sigmoid(log 3) = 3 / 4, times 3 * gelu(1) = 3 * 0.8413447 = 2.524034.
    np.testing.assert_allclose(shared(jnp.ones((1, 1, 1)), None), [[[0.75 * 2.524034]]], rtol=1e-5)


def test_residual_by_hand():
    residual = Residual(dense=GELU(hidden=1)).build(width=1, key=jax.random.key(0))
    residual.dense.up[...], residual.dense.down[...] = jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 3.0)
    residual.kernel[...], residual.bias[...] = jnp.array([[np.log(2.0), 0.0]]), jnp.array([np.log(1.5), 0.0])
    # Logits log 2 + log 1.5 = log 3 and 0: coefficients 3/4 and 1/4. 3/4 * 10 + 1/4 * 3 * 0.8413447 = 8.1310085.
    np.testing.assert_allclose(residual(jnp.ones((1, 1)), jnp.full((1, 1), 10.0)), [[8.1310085]], rtol=1e-5)


def test_latent_experts_have_the_latent_width_and_the_router_the_full_one():
    layer = nnx.eval_shape(lambda: ALL.build(width=D, key=jax.random.key(0)))
    assert layer.experts.gate.shape == (E, W, F) and layer.experts.down.shape == (E, F, W)
    assert layer.router.gate.kernel.shape == (D, E) and layer.shared.expert.up.shape == (1, D, 6)
    assert layer.latent.down.get_metadata()["axes"] == ("embed", "mlp")
    assert layer.latent.up.get_metadata()["axes"] == ("mlp", "embed")


def test_a_layer_without_options_keeps_its_numbers():
    plain, all_of_them = (config.build(width=D, key=jax.random.key(1)) for config in (BASE, ALL))
    np.testing.assert_array_equal(plain.router.gate.kernel[...], all_of_them.router.gate.kernel[...])
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert names == {"router", "experts"}


def test_options_in_bfloat16_are_close_to_float32(x):
    # All experts for every token, so that rounding moves none to another.
    config = dataclasses.replace(ALL, router=TopK(k=E, renormalize=False))
    graph, state = nnx.split(config.build(width=D, key=jax.random.key(1)))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])
    exact, rough = run(state, x), run(state, x.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


MODEL = Decoder(vocab=24, width=D, layers=2, attention=Attention(heads=2), ffn=ALL)


def test_options_stack_and_unstack_and_taps_see_what_they_saw():
    # Traced, not run: tests/models/test_sharding.py runs them stacked.
    tokens = jnp.zeros((1, 6), jnp.int32)

    def shapes(stacked):
        graph, state = nnx.split(nnx.eval_shape(lambda: MODEL.build(jax.random.key(0), stacked=stacked)))
        tap = lambda path, x, routing: (x, routing)  # noqa: E731
        return state, jax.eval_shape(lambda state: nnx.merge(graph, state)(tokens, tap=tap), state)

    (state, output), (_, unstacked_output) = shapes(True), shapes(False)
    assert output == unstacked_output
    assert set(output.taps) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("attention", "ffn")} | {"head"}
    for _, variable in nnx.to_flat_state(state["segments"]):
        assert variable.get_metadata()["axes"][0] == "layers" and variable.get_value().shape[0] == 2


def test_active_flops_of_options_are_those_of_the_traced_layer():
    # "xla" is the one implementation whose products a jaxpr shows as what they are; sorted rows, K of E experts.
    config = MoE(
        experts=E,
        router=TopK(k=2),
        expert=SwiGLU(hidden=F, implementation="xla"),
        **OPTIONS,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(width=D, key=jax.random.key(0))))
    traced = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(jnp.zeros((T, D)))[0])(state)
    parts = {part.name: part for part in count_parts(dataclasses.replace(MODEL, layers=1, ffn=config), T)}
    inside = ("router", "experts", "latent projections", "shared experts", "residual network")
    assert sum(parts[name].flops for name in inside) == count_flops(traced).flops / T
    # Down 8 * 4 and up 4 * 8; shared 3 * 8 * 6 and its gate 8; residual 3 * 8 * 10, two coefficients of 8, two biases.
    assert parts["latent projections"][1:] == (64, 64, 128)
    assert parts["shared experts"][1:] == (152, 152, 304)
    assert parts["residual network"][1:] == (258, 258, 512)


def test_fine_grained_experts_cost_what_they_cost_before_but_for_the_router():
    fine = fine_grained(dataclasses.replace(BASE, shared=SwiGLU(hidden=6)), 3)
    assert (fine.experts, fine.router.k, fine.expert.hidden, fine.shared.hidden) == (3 * E, 6, F // 3, 6)
    assert fine_grained(BASE, 1) == BASE
    before, after = (
        {part.name: part for part in count_parts(dataclasses.replace(MODEL, ffn=ffn), T)} for ffn in (BASE, fine)
    )
    assert after["experts"] == before["experts"]
    assert after["router"].flops == 3 * before["router"].flops


def test_fine_grained_of_top_1_keeps_switchs_weights():
    switch = dataclasses.replace(BASE, router=TopK(k=1, renormalize=False))
    assert fine_grained(switch, 2).router == TopK(k=2, renormalize=False)


def test_fine_grained_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match=r"factor is 5; it must divide moe\.expert\.hidden, which is 12"):
        fine_grained(BASE, 5)
    with pytest.raises(ValueError, match=r"factor is 0; it must be at least 1"):
        fine_grained(BASE, 0)
    shared = dataclasses.replace(BASE, expert=GatedShared())
    with pytest.raises(ValueError, match=r"moe\.expert is GatedShared.*; it must be a dataclass with a field 'hidden'"):
        fine_grained(shared, 2)


def test_a_latent_width_below_one_is_refused():
    with pytest.raises(ValueError, match=r"Latent\.width is 0; it must be at least 1"):
        Latent(width=0)
