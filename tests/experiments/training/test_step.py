"""One step: the gradient of the measured loss, whole over micro-batches, applied once or not at all."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynamoe.experiments.data import Windows, target_mask
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import Optimizer
from dynamoe.experiments.serialization import call_recipe
from dynamoe.experiments.training.step import (
    LAYER_FIGURES,
    MEAN_FIGURES,
    ROUTERS,
    Trainer,
    TrainState,
    build_trainer,
)
from dynamoe.models import Decoder, Layout, MeshShape
from dynamoe.moe import BalanceLoss, CapacityDispatcher, DenseDispatcher, MoE, SwiGLU

LENGTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent(Optimizer):
    """Parameters minus gradient: an update shows the gradient itself."""

    clip: float = 1e9

    def update_rule(self, params: nnx.State, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.sgd(1.0)


def trainer_of(model: Decoder, *, accumulation: int = 1) -> Trainer:
    return build_trainer(model, Descent(), Layout(MeshShape().build()), steps=10, accumulation=accumulation)


@pytest.fixture(scope="module")
def dense(dense_model: Decoder) -> Trainer:
    return trainer_of(dense_model)


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Four rows with 16, 15, 3 and 7 targets: one document, two, a short one, two and padding."""
    tokens = np.random.default_rng(0).integers(0, 256, (4, LENGTH + 1), dtype=np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, documents in enumerate([(17,), (6, 11), (4,), (5, 4)]):
        start = 0
        for number, size in enumerate(documents, 1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    windows = Windows(tokens, segments, positions, (segments > 0).astype(np.int32))
    assert target_mask(windows).sum(axis=1).tolist() == [16, 15, 3, 7]
    return windows


def start_of(trainer: Trainer, seed: int = 0) -> TrainState:
    return trainer.init(jnp.uint32(seed))


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_close(found: Any, expected: Any, *, rtol: float, atol: float) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def assert_same_bits(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


def test_gradient_is_the_slope_of_the_measured_loss(dense: Trainer, windows: Windows) -> None:
    before = start_of(dense)
    variables = before.variables
    params = jax.tree.map(np.asarray, before.params)
    after, _ = dense.step(before, windows)
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), params, after.params)
    length = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient)))

    def loss(along: float) -> float:
        moved = jax.tree.map(lambda p, g: p + np.float32(along / length) * g, params, gradient)
        nats, targets = dense.evaluate(moved, variables, windows)
        return float(nats) / int(targets)

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, length, rtol=2e-3)


def test_loss_is_the_mean_over_the_targets(dense: Trainer, windows: Windows) -> None:
    state = start_of(dense)
    nats, targets = dense.evaluate(state.params, state.variables, windows)
    assert int(targets) == 41
    _, metrics = dense.step(state, windows)
    np.testing.assert_allclose(float(metrics["loss"]), float(nats) / 41, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_of_unequal_size_give_the_same_update_of_a_dense_model(
    dense: Trainer, dense_model: Decoder, windows: Windows, parts: int
) -> None:
    whole, expected = dense.step(start_of(dense), windows)
    accumulated, metrics = trainer_of(dense_model, accumulation=parts).step(start_of(dense), windows)
    assert_close(accumulated.params, whole.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(float(metrics["loss"]), float(expected["loss"]), rtol=1e-6)
    np.testing.assert_allclose(float(metrics["gradient_norm"]), float(expected["gradient_norm"]), rtol=1e-5)


def test_micro_batches_change_a_mixture_only_through_its_balance_loss(
    tiny: Callable[..., Experiment], windows: Windows
) -> None:
    losses = (BalanceLoss(coefficient=0.0),)
    ffn = MoE(experts=4, expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher(), losses=losses)
    model = dataclasses.replace(tiny().model, ffn=ffn)
    one, two = trainer_of(model), trainer_of(model, accumulation=2)
    whole, expected = one.step(start_of(one), windows)
    accumulated, metrics = two.step(start_of(one), windows)
    assert_close(accumulated.params, whole.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(float(metrics["loss"]), float(expected["loss"]), rtol=1e-6)
    balance = float(expected["BalanceLoss"])
    assert float(metrics["BalanceLoss"]) != pytest.approx(balance, rel=1e-5)  # the mean of each half's
    assert float(metrics["BalanceLoss"]) == pytest.approx(balance, rel=0.5)


def test_the_state_is_consumed_and_the_next_has_the_promised_shapes(dense: Trainer, windows: Windows) -> None:
    before = start_of(dense)
    arrays = jax.tree.leaves((before.params, before.optimizer))
    after, _ = dense.step(before, windows)
    assert all(array.is_deleted() for array in arrays)
    assert int(after.step) == 1
    for array, promise in zip(jax.tree.leaves(after), jax.tree.leaves(dense.abstract_state), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (promise.shape, promise.dtype, promise.sharding)


def test_the_seed_decides_the_parameters(dense: Trainer) -> None:
    assert_same_bits(start_of(dense, 3), start_of(dense, 3))
    first, second = flat(start_of(dense, 3).params), flat(start_of(dense, 4).params)
    assert any((first[name] != second[name]).any() for name in first)


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_parameters(dense: Trainer, windows: Windows) -> None:
    state = start_of(dense)
    kernel = state.params["head_kernel"].get_value().at[3, 5].set(jnp.nan)
    state.params["head_kernel"] = state.params["head_kernel"].replace(kernel)
    before = jax.tree.map(np.array, state)
    after, metrics = dense.step(state, windows)
    assert not metrics["finite"]
    assert math.isnan(float(metrics["loss"]))
    assert math.isnan(float(metrics["gradient_norms"]["embedding"]))
    assert_same_bits(after, before)


@pytest.fixture(scope="module")
def noisy(noisy_model: Decoder) -> Trainer:
    return trainer_of(noisy_model)


@pytest.fixture(scope="module")
def noisy_model(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Decoder:
    """A recipe's own router, that draws noise and keeps a state."""
    file = tmp_path_factory.mktemp("noisy") / "noisy.py"
    file.write_text(recipe_text)
    return call_recipe(file).model


def test_noise_is_drawn_from_seed_and_step(noisy: Trainer, windows: Windows) -> None:
    def entropy(seed: int, step: int) -> float:
        state = start_of(noisy)
        numbers = jax.device_put((jnp.uint32(seed), jnp.int32(step)), state.step.sharding)
        state = state._replace(seed=numbers[0], step=numbers[1])
        return float(noisy.step(state, windows)[1]["router_entropy"])

    assert entropy(0, 0) == entropy(0, 0)
    assert len({entropy(0, 0), entropy(0, 1), entropy(1, 0)}) == 3


def test_a_routers_state_follows_the_load_and_the_optimizer_never_sees_it(noisy: Trainer, windows: Windows) -> None:
    state = start_of(noisy)
    before = np.tile(np.arange(4, dtype=np.float32), (2, 1))  # two layers
    state, metrics = noisy.step(state, windows)
    (bias,) = flat(state.variables).values()
    load = np.stack([metrics[ROUTERS][f"layers.{layer}.load"] for layer in range(2)])
    np.testing.assert_allclose(bias, before + 0.1 * (0.25 - load), rtol=1e-5)
    assert (bias != before).any() and not any("bias" in name for name in flat((state.params, state.optimizer)))


def test_each_micro_batch_moves_a_routers_state_on(noisy_model: Decoder, noisy: Trainer, windows: Windows) -> None:
    state = start_of(noisy)
    initial = jax.tree.map(np.asarray, (state.params, state.variables))
    accumulated, metrics = trainer_of(noisy_model, accumulation=2).step(state, windows)
    (bias,) = flat(accumulated.variables).values()
    # The metrics are the mean over the two halves of the batch, each of which moved the bias by 0.1 (1/4 - its load).
    load = np.stack([metrics[ROUTERS][f"layers.{layer}.load"] for layer in range(2)])
    (before,) = flat(initial[1]).values()
    np.testing.assert_allclose(bias, before + 2 * 0.1 * (0.25 - load), rtol=1e-5)


def test_statistics_are_those_of_each_layer_and_metrics_their_mean(
    tiny: Callable[..., Experiment], windows: Windows
) -> None:
    ffn = MoE(experts=4, expert=SwiGLU(hidden=16), dispatcher=CapacityDispatcher(capacity_factor=0.5))
    trainer = trainer_of(dataclasses.replace(tiny().model, ffn=ffn))
    _, metrics = trainer.step(start_of(trainer), windows)
    layers = metrics[ROUTERS]
    assert set(layers) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in LAYER_FIGURES}
    for mean, name in MEAN_FIGURES.items():
        values = [float(layers[f"layers.{layer}.{name}"]) for layer in (0, 1)]
        assert float(metrics[mean]) == pytest.approx(sum(values) / 2) and (min(values) > 0) == (name != "overflow")
