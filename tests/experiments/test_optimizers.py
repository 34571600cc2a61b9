"""AdamW against NumPy in float64; Muon's updates are orthogonal, matrix by matrix; schedules by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynamoe.experiments.optimizers import AdamW, Muon, Optimizer, Schedule, WarmupCosine, WarmupStableDecay
from dynamoe.models import Attention, Decoder, with_layers
from dynamoe.models.decoder import DecoderLM
from dynamoe.moe import MoE, SwiGLU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """A schedule of the user's own."""

    def build(self, *, peak: float, steps: int) -> optax.Schedule:
        return optax.constant_schedule(peak)


def parameters(**arrays: tuple[np.ndarray, tuple[str | None, ...]]) -> nnx.State:
    return nnx.State({name: nnx.Param(jnp.asarray(array), axes=axes) for name, (array, axes) in arrays.items()})


def run(optimizer: Optimizer, params: nnx.State, gradients: list[nnx.State], steps: int = 10) -> nnx.State:
    """The parameters after as many updates as there are gradients."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rule = optimizer.build(params, steps=steps)
        state, update = rule.init(params), jax.jit(rule.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)  # type: ignore
    return params


def test_warmup_and_cosine_by_hand() -> None:
    rate = WarmupCosine(warmup=4, final=0.1).build(peak=2.0, steps=20)
    assert [float(rate(step)) for step in (0, 1, 2, 4)] == pytest.approx([0.0, 0.5, 1.0, 2.0])
    half = 0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 16)) / 2  # 8 of the 16 steps after the warm-up
    assert float(rate(12)) == pytest.approx(2.0 * half)
    assert float(rate(20)) == pytest.approx(0.2)


def test_warmup_plateau_and_decay_by_hand() -> None:
    rate = WarmupStableDecay(warmup=4, decay=0.25, final=0.5).build(peak=2.0, steps=20)
    expected = {0: 0.0, 2: 1.0, 4: 2.0, 10: 2.0, 15: 2.0, 16: 1.8, 18: 1.4, 20: 1.0}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [WarmupCosine(warmup=50), WarmupStableDecay(warmup=50)])
def test_a_short_run_warms_up_for_a_fifth_of_it(schedule: Schedule) -> None:
    rate = schedule.build(peak=1.0, steps=10)
    assert [float(rate(step)) for step in (0, 1, 2)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(rate(9)) < 1.0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", [WarmupCosine(), WarmupStableDecay()])
def test_the_shortest_runs_have_finite_rates(schedule: Schedule, steps: int) -> None:
    rate = schedule.build(peak=1.0, steps=steps)
    assert all(0.0 <= float(rate(step)) <= 1.0 for step in range(steps + 1))


def test_three_steps_of_adamw_against_float64() -> None:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "matrix": ((3, 4), ("embed", "mlp")),
        "experts": ((2, 3, 4), ("expert", "embed", "mlp")),
        "norm": ((2, 3), ("layers", "embed")),  # two layers' vectors are no matrix
        "expert_bias": ((2, 4), ("expert", "mlp")),
    }
    decayed = {"matrix", "experts"}

    def draw(scale: float) -> dict[str, np.ndarray]:
        return {name: (scale * random.normal(size=shape)).astype(np.float32) for name, (shape, _) in shapes.items()}

    def state(arrays: dict[str, np.ndarray]) -> nnx.State:
        return parameters(**{name: (array, shapes[name][1]) for name, array in arrays.items()})

    start, gradients = draw(1.0), [draw(0.02), draw(3.0), draw(1.0)]  # the first is not clipped, the others are
    optimizer = AdamW(
        learning_rate=0.1, schedule=WarmupCosine(warmup=2), weight_decay=0.3, clip=0.7, beta1=0.8, beta2=0.9
    )
    found = run(optimizer, state(start), [state(gradient) for gradient in gradients])

    value = {name: array.astype(np.float64) for name, array in start.items()}
    first = {name: np.zeros_like(array) for name, array in value.items()}
    second = {name: np.zeros_like(array) for name, array in value.items()}
    clipped = 0
    for step, (gradient, rate) in enumerate(zip(gradients, (0.0, 0.05, 0.1), strict=True), 1):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        clipped += norm > 0.7
        for name in value:
            g = gradient[name].astype(np.float64) * min(1.0, 0.7 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            direction = (first[name] / (1 - 0.8**step)) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-8)
            decay = 0.3 * value[name] if name in decayed else 0.0
            value[name] = value[name] - rate * (direction + decay)
    assert clipped == 2
    for name, expected in value.items():
        np.testing.assert_allclose(found[name].get_value(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


MODEL = Decoder(
    vocab=40,
    width=16,
    layers=2,
    attention=Attention(heads=4, kv_heads=2, qk_norm=True),
    ffn=MoE(experts=3, expert=SwiGLU(hidden=8)),
)
MUON = Muon(learning_rate=0.1, schedule=Constant(), weight_decay=0.0, clip=1e9)
ORTHOGONAL = {  # the dimensions of one layer's matrix that come together on each side
    "query": ((0,), (1, 2)),
    "key": ((0,), (1, 2)),
    "value": ((0,), (1, 2)),
    "output": ((0, 1), (2,)),
    "gate": ((-2,), (-1,)),
    "up": ((-2,), (-1,)),
    "down": ((-2,), (-1,)),
}


def params_of(model: DecoderLM) -> nnx.State:
    return nnx.state(model, nnx.Param)


def with_params(model: DecoderLM, params: nnx.State) -> DecoderLM:
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, params, rest)


@pytest.fixture(scope="module")
def models() -> tuple[DecoderLM, DecoderLM]:
    """A model, and another whose parameters serve as gradients; both unstacked."""
    with jax.numpy_dtype_promotion("standard"):
        return MODEL.build(jax.random.key(0), stacked=False), MODEL.build(jax.random.key(1), stacked=False)


@pytest.fixture(scope="module")
def moved(models: tuple[DecoderLM, DecoderLM]) -> nnx.State:
    """The parameters after Muon's first update."""
    model, gradient = models
    return run(MUON, params_of(model), [params_of(gradient)])


@pytest.fixture(scope="module")
def muon_update(
    models: tuple[DecoderLM, DecoderLM], moved: nnx.State
) -> dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]:
    """Gradient and first update of every parameter, by path."""
    before, gradient, after = (
        dict(nnx.to_flat_state(state)) for state in (params_of(models[0]), params_of(models[1]), moved)
    )
    return {
        path: (np.asarray(gradient[path][...]), np.asarray(after[path][...]) - np.asarray(before[path][...]))
        for path in before
    }


def test_muon_orthogonalises_each_matrix_of_each_layer_and_expert(
    muon_update: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]],
) -> None:
    seen = set()
    for path, (_, update) in muon_update.items():
        name = path[-1]
        if name not in ORTHOGONAL:
            continue
        rows, columns = ORTHOGONAL[name]
        experts = update if "experts" in path else update[None]
        for matrix in experts:
            size = math.prod(matrix.shape[i] for i in rows)
            values = np.linalg.svd(matrix.reshape(size, -1), compute_uv=False)
            # Five Newton-Schulz steps bring every singular value near to one, up to a common factor.
            assert values.min() > 0.55 * values.max(), (path, values)
        root_mean_square = math.sqrt(float(np.square(update).mean()))
        assert 0.1 * 0.2 * 0.6 < root_mean_square < 0.1 * 0.2 * 1.3, path  # 0.2 of the learning rate, as AdamW's
        seen.add(name)
        assert math.prod(matrix.shape[i] for i in columns) > 1
    assert seen == set(ORTHOGONAL)


def test_muon_leaves_embedding_head_router_and_norms_to_adam(
    muon_update: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]],
) -> None:
    names = set()
    first = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # optax looks one step ahead here too (Nesterov), so a bit more than the rate
    for path, (gradient, update) in muon_update.items():
        if path[-1] in ORTHOGONAL:
            continue
        large = np.abs(gradient) > 1e-3
        np.testing.assert_allclose(update[large], -0.1 * first * np.sign(gradient[large]), rtol=1e-3, err_msg=str(path))
        names.add(path[-1] if "router" not in path else "router")
    assert names == {"embedding", "head_kernel", "router", "scale"}


def test_a_stacked_model_gets_muons_updates_of_the_unstacked_one(
    models: tuple[DecoderLM, DecoderLM], moved: nnx.State
) -> None:
    stacked, gradient = (with_layers(model, stacked=True) for model in models)
    updated = with_params(stacked, run(MUON, params_of(stacked), [params_of(gradient)]))
    found = dict(nnx.to_flat_state(params_of(with_layers(updated, stacked=False))))
    for path, variable in nnx.to_flat_state(moved):
        np.testing.assert_allclose(found[path][...], variable[...], rtol=2e-4, atol=2e-5, err_msg=str(path))


def test_weight_decay_shrinks_muons_matrices_too() -> None:
    params = parameters(w=(np.ones((4, 4), np.float32), ("embed", "mlp")))
    still = parameters(w=(np.zeros((4, 4), np.float32), ("embed", "mlp")))
    found = run(dataclasses.replace(MUON, weight_decay=0.5), params, [still])
    np.testing.assert_allclose(found["w"].get_value(), 1 - 0.1 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "optimizer.learning_rate is -1.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
        ({"clip": 0.0}, "optimizer.clip is 0.0"),
        ({"clip": math.nan}, "optimizer.clip is nan"),
    ],
)
@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_refuses_a_number_with_its_name(kind: type[Optimizer], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)  # type: ignore


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(learning_rate=0.0), "learning_rate is 0.0; it must be above 0"),
        (lambda: AdamW(clip=0.0), "clip is 0.0; it must be above 0"),
        (lambda: Muon(weight_decay=-0.1), "weight_decay is -0.1; it must be at least 0"),
        (lambda: WarmupCosine(final=1.5), "WarmupCosine.final is 1.5; it must be from 0 to 1"),
        (lambda: WarmupStableDecay(decay=-0.2), "WarmupStableDecay.decay is -0.2; it must be from 0 to 1"),
        (lambda: WarmupStableDecay(warmup=-1), "WarmupStableDecay.warmup is -1; it must be at least 0 steps"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
