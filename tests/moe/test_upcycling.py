"""Experts out of a dense network: the function against float64, what noise changes, clusters of equal size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import (
    GELU,
    Copy,
    CopyWithNoise,
    DenseDispatcher,
    EqualWeights,
    Experts,
    GranularSplit,
    MoE,
    MoEfication,
    Router,
    Sigmoid,
    SwiGLU,
    TopK,
    Upcycling,
)
from dynamoe.moe.layer import MoELayer
from dynamoe.moe.upcycling import DenseWeights
from dynamoe.moe.upcycling.balanced_k_means import balanced_k_means

T, D, F = 10, 6, 12


def mixture(experts: int, router: Router, expert: Experts) -> MoE:
    return MoE(experts=experts, router=router, expert=expert, dispatcher=DenseDispatcher())


def dense_weights(expert: type[Experts] = SwiGLU) -> DenseWeights:
    random = np.random.default_rng(0)
    gate, up, down = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((D, F), (D, F), (F, D)))
    return DenseWeights(gate if expert is SwiGLU else None, up, down)


def upcycled(technique: Upcycling, config: MoE, dense: DenseWeights) -> MoELayer:
    """The layer with the technique's weights; jitted as a whole, for single operations compile longer."""

    @jax.jit
    def make(dense: DenseWeights) -> MoELayer:
        layer = config.build(width=D, key=jax.random.key(1))
        gate = layer.router.gate.kernel  # type: ignore
        experts, kernel = technique(dense, gate[...], mixture=config, key=jax.random.key(2))
        assert kernel is not None and kernel.shape == gate.shape
        gate[...] = kernel
        for name, array in experts._asdict().items():
            if array is not None:
                assert array.shape == getattr(layer.experts, name).shape
                getattr(layer.experts, name)[...] = array
        return layer

    return make(dense)


@jax.jit
def output(layer: MoELayer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the layer makes of tokens, and the load of its experts."""
    y, stats = layer(x)
    return y, stats.load


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)


def dense_output(dense: DenseWeights, x: jax.Array) -> np.ndarray:
    """The dense network, in float64."""
    up, down, tokens = (np.asarray(array, np.float64) for array in (dense.up, dense.down, x))
    if dense.gate is None:
        hidden = np.vectorize(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2)(tokens @ up)
    else:
        gate = tokens @ np.asarray(dense.gate, np.float64)
        hidden = gate / (1 + np.exp(-gate)) * (tokens @ up)
    return hidden @ down


KEEPING = {
    "copies, 2 of 4": (Copy(), mixture(4, TopK(k=2), SwiGLU(hidden=12))),
    "copies, GELU": (Copy(), mixture(4, TopK(k=2), GELU(hidden=12))),
    "copies, sigmoid scores": (Copy(), mixture(4, TopK(k=2, scores=Sigmoid()), SwiGLU(hidden=12))),
    "2 shards, 4 of 8": (GranularSplit(shards=2), mixture(8, TopK(k=4), SwiGLU(hidden=6))),
    "3 shards, 6 of 9": (GranularSplit(shards=3), mixture(9, TopK(k=6), SwiGLU(hidden=4))),
    "shards that are summed": (GranularSplit(shards=2), mixture(8, EqualWeights(k=4), GELU(hidden=6))),
}


@pytest.mark.parametrize("case", KEEPING)
def test_the_function_is_kept(case: str, x: jax.Array) -> None:
    technique, config = KEEPING[case]
    assert technique.keeps_function
    dense = dense_weights(type(config.expert))
    y, load = output(upcycled(technique, config, dense), x)
    np.testing.assert_allclose(y, dense_output(dense, x), rtol=1e-4, atol=1e-4)
    chosen = np.count_nonzero(np.asarray(load))
    assert chosen > config.router.experts_per_token, "the tokens choose different experts, or this would say little"


def test_softmax_that_is_not_renormalised_needs_a_scale_and_keeps_the_function_at_equal_probabilities(
    x: jax.Array,
) -> None:
    config = mixture(8, TopK(k=2, renormalize=False), SwiGLU(hidden=6))
    dense = dense_weights()
    # 8 experts, 2 per token, 2 shards: in He et al.'s letters E = 4, G = 2, T = 2, and E G^2 / T = 8.
    with pytest.raises(ValueError, match="another sum for every token.*8 is right while all experts are equally"):
        upcycled(GranularSplit(shards=2), config, dense)
    technique = GranularSplit(shards=2, scale=8.0)
    assert not technique.keeps_function
    layer = upcycled(technique, config, dense)
    assert np.abs(output(layer, x)[0] - dense_output(dense, x)).max() > 0.1
    layer.router.gate.kernel[...] = jnp.zeros((D, 8))  # type: ignore
    np.testing.assert_allclose(output(layer, x)[0], dense_output(dense, x), rtol=1e-4, atol=1e-4)


def test_the_scale_of_a_switch_router_is_named() -> None:
    config = mixture(8, TopK(k=1, renormalize=False), SwiGLU(hidden=12))
    with pytest.raises(ValueError, match="TopK.renormalize=True., or set the technique's scale; 8 is right"):
        upcycled(Copy(), config, dense_weights())
    layer = upcycled(Copy(scale=8.0), config, dense_weights())
    np.testing.assert_allclose(layer.experts.down[3], 8 * dense_weights().down)  # type: ignore


def test_shards_and_virtual_groups_by_hand() -> None:
    config = mixture(4, TopK(k=2), SwiGLU(hidden=6))
    dense = dense_weights()
    fresh = config.build(width=D, key=jax.random.key(1)).router.gate.kernel[...]  # type: ignore
    layer = upcycled(GranularSplit(shards=2), config, dense)
    for expert, (shard, group) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        units = slice(6 * shard, 6 * shard + 6)
        np.testing.assert_array_equal(layer.experts.gate[expert], dense.gate[:, units])  # type: ignore
        np.testing.assert_array_equal(layer.experts.up[expert], dense.up[:, units])  # type: ignore
        np.testing.assert_array_equal(layer.experts.down[expert], 2 * dense.down[units])  # type: ignore
        np.testing.assert_allclose(layer.router.gate.kernel[:, expert], fresh[:, group], rtol=1e-5)  # type: ignore


@pytest.mark.parametrize(("ratio", "redrawn"), [(0.3, 3), (1.0, 12)])
def test_noise_redraws_the_stated_share_of_hidden_units(ratio: float, redrawn: int) -> None:
    dense, config = dense_weights(), mixture(4, TopK(k=2), SwiGLU(hidden=12))
    experts, _ = jax.jit(lambda dense: CopyWithNoise(ratio=ratio)(dense, None, mixture=config, key=jax.random.key(3)))(
        dense
    )
    moved = [
        np.asarray((experts.gate != dense.gate[None]).any(axis=1)),  # type: ignore
        np.asarray((experts.up != dense.up[None]).any(axis=1)),
        np.asarray((experts.down != dense.down[None]).any(axis=2)),
    ]
    np.testing.assert_array_equal(moved[0].sum(axis=1), [redrawn] * 4)
    np.testing.assert_array_equal(moved[0], moved[1])
    np.testing.assert_array_equal(moved[0], moved[2])
    if 0 < redrawn < 11:
        assert len({row.tobytes() for row in moved[0]}) > 1, "each expert has units of its own"


def test_noise_has_the_mean_and_deviation_of_what_it_replaces() -> None:
    random = np.random.default_rng(0)
    up = jnp.asarray(random.normal(3.0, 0.5, size=(50, 400)), jnp.float32)
    down = jnp.asarray(random.normal(-1.0, 2.0, size=(400, 50)), jnp.float32)
    config = mixture(2, TopK(k=2), GELU(hidden=400))
    make = jax.jit(lambda *w: CopyWithNoise()(DenseWeights(None, *w), None, mixture=config, key=jax.random.key(0)))
    experts, _ = make(up, down)
    for weights, old, mean, deviation in ((experts.up, up, 3.0, 0.5), (experts.down, down, -1.0, 2.0)):
        drawn = np.asarray(weights)[np.asarray(weights != old[None])]
        assert drawn.size == 2 * 200 * 50
        # 20,000 draws: the standard errors of mean and deviation are below 0.01 and 0.75% of the deviation.
        assert abs(drawn.mean() - mean) < 0.03 * deviation and abs(drawn.std() / deviation - 1) < 0.03


@pytest.mark.parametrize("expert", [SwiGLU(hidden=3), GELU(hidden=3)], ids=str)
def test_moefication_is_the_dense_network_where_all_experts_are_selected(expert: Experts, x: jax.Array) -> None:
    dense = dense_weights(type(expert))
    layer = upcycled(MoEfication(), mixture(4, EqualWeights(k=4), expert), dense)
    np.testing.assert_allclose(output(layer, x)[0], dense_output(dense, x), rtol=1e-4, atol=1e-4)
    units = np.concatenate(np.asarray(layer.experts.up[...]), axis=1)  # type: ignore
    assert sorted(map(tuple, units.T)) == sorted(map(tuple, np.asarray(dense.up).T)), "each unit is there once"
    some = output(upcycled(MoEfication(), mixture(4, EqualWeights(k=2), expert), dense), x)[0]
    assert np.abs(some - dense_output(dense, x)).max() > 0.1


def test_moefication_finds_units_of_one_direction_and_routes_to_them() -> None:
    # Units along e0, e1 and e2, of several lengths and in mixed order; the second half of their indices is e0's.
    axis = [1, 2, 1, 2, 2, 1, 2, 1, 0, 0, 0, 0]
    gate = jnp.asarray(np.eye(D)[axis].T * np.linspace(0.5, 2, F), jnp.float32)
    dense = dense_weights()._replace(gate=gate)
    layer = upcycled(MoEfication(), mixture(3, EqualWeights(k=1), SwiGLU(hidden=4)), dense)
    for direction in range(3):
        token = jnp.eye(D)[direction : direction + 1]
        # All the units that are active for the token are in the one expert it is sent to.
        np.testing.assert_allclose(output(layer, token)[0], dense_output(dense, token), rtol=1e-4, atol=1e-5)
    lengths = np.linalg.norm(layer.router.gate.kernel[...], axis=0)  # type: ignore
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_balanced_clusters_are_those_that_were_drawn() -> None:
    random = np.random.default_rng(0)
    truth = random.permutation(np.repeat(np.arange(4), 6))
    points = 10 * np.eye(4)[truth] + random.normal(size=(24, 4))
    found = balanced_k_means(jnp.asarray(points, jnp.float32), 4, iterations=20, key=jax.random.key(0))
    assert sorted(map(tuple, np.asarray(found))) == sorted(tuple(np.flatnonzero(truth == c)) for c in range(4))


@pytest.mark.parametrize("clusters", [1, 5])
def test_balanced_clusters_have_equal_sizes_also_where_the_points_have_not(clusters: int) -> None:
    points = jnp.asarray(np.r_[np.ones((17, 3)), np.random.default_rng(0).normal(size=(3, 3))], jnp.float32)
    found = balanced_k_means(points, clusters, iterations=3, key=jax.random.key(0))
    assert found.shape == (clusters, 20 // clusters)
    assert sorted(np.asarray(found).reshape(-1)) == list(range(20))


REFUSED = {
    "experts": (GranularSplit(shards=4), mixture(6, TopK(k=4), SwiGLU(hidden=3)), "shards is 4 and MoE.experts 6"),
    "k": (GranularSplit(shards=2), mixture(6, TopK(k=3), SwiGLU(hidden=6)), "is 2 and the router's .* token 3"),
    "width": (GranularSplit(shards=5), mixture(5, TopK(k=5), SwiGLU(hidden=2)), "is 5 and the dense .* width 12"),
    "clusters": (MoEfication(), mixture(5, EqualWeights(k=2), SwiGLU(hidden=2)), "experts is 5 and .* width 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_divide_are_refused(case: str) -> None:
    technique, config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        upcycled(technique, config, dense_weights())


@pytest.mark.parametrize("technique", [GranularSplit(shards=2), MoEfication()], ids=str)
def test_a_router_without_a_gate_is_refused_where_its_weights_are_set(technique: Upcycling) -> None:
    config = mixture(4, TopK(k=2), SwiGLU(hidden=6))
    with pytest.raises(ValueError, match="has no single Gate"):
        technique(dense_weights(), None, mixture=config, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(scale=0.0), "Copy.scale is 0.0"),
        (lambda: CopyWithNoise(ratio=1.5), "CopyWithNoise.ratio is 1.5; it must be from 0 to 1"),
        (lambda: CopyWithNoise(scale=-1.0), "CopyWithNoise.scale is -1.0"),
        (lambda: GranularSplit(shards=0), "GranularSplit.shards is 0"),
        (lambda: MoEfication(iterations=0), "MoEfication.iterations is 0"),
    ],
)
def test_a_number_out_of_range_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
