"""Two stages: at first the routers alone move, as if nothing else were there; then everything, from a fresh start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynamoe.experiments.optimizers import AdamW, TrainingRule, WarmupStableDecay
from dynamoe.experiments.router_first import RouterFirst

INNER = AdamW(learning_rate=0.1, schedule=WarmupStableDecay(warmup=1), clip=0.7, weight_decay=0.3)
STAGE, STEPS = 3, 8
SHAPES = {"router": (3, 2), "experts": (2, 3, 4)}
AXES = {"router": ("embed", None), "experts": ("expert", "embed", "mlp")}


def state(random: np.random.Generator, *names: str) -> nnx.State:
    """Parameters as {"ffn": {"router": {"kernel": ...}, "experts": {"kernel": ...}}}, or gradients of them."""
    arrays = {name: jnp.asarray(random.normal(size=SHAPES[name]), jnp.float32) for name in SHAPES}
    return nnx.State({"ffn": {name: {"kernel": nnx.Param(arrays[name], axes=AXES[name])} for name in names}})


def trajectory(rule: TrainingRule, params: nnx.State, gradients: list[nnx.State], steps: int) -> list[dict[str, Any]]:
    """The parameters before and after every update, by name."""
    found = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        transformation = rule.build(params, steps=steps)
        moments, update = transformation.init(params), jax.jit(transformation.update)
        for gradient in [*gradients, None]:
            found.append({name: np.asarray(params["ffn"][name]["kernel"].get_value()) for name in params["ffn"]})
            if gradient is not None:
                updates, moments = update(gradient, moments, params)
                params = optax.apply_updates(params, updates)  # type: ignore
    return found


def test_each_stage_is_a_run_of_the_optimizer_of_its_own() -> None:
    random = np.random.default_rng(0)
    start, gradients = state(random, *SHAPES), [state(random, *SHAPES) for _ in range(STEPS - 2)]
    both = trajectory(RouterFirst(optimizer=INNER, steps=STAGE), start, gradients, STEPS)

    def routers(tree: nnx.State) -> nnx.State:
        return nnx.State({"ffn": {"router": tree["ffn"]["router"]}})

    alone = trajectory(INNER, routers(start), [routers(gradient) for gradient in gradients[:STAGE]], STAGE)
    for step in range(STAGE + 1):
        assert both[step]["experts"].tobytes() == both[0]["experts"].tobytes(), "nothing else moves by a bit"
        np.testing.assert_allclose(both[step]["router"], alone[step]["router"], rtol=1e-6)
    assert np.abs(both[STAGE]["router"] - both[0]["router"]).max() > 0.05

    halfway = nnx.State(
        {"ffn": {name: {"kernel": nnx.Param(jnp.asarray(both[STAGE][name]), axes=AXES[name])} for name in SHAPES}}
    )
    # No moment, no count and no step of the schedule is left over from the first stage.
    after = trajectory(INNER, halfway, gradients[STAGE:], STEPS - STAGE)
    for step, expected in enumerate(after):
        for name in SHAPES:
            np.testing.assert_allclose(both[STAGE + step][name], expected[name], rtol=1e-6, err_msg=name)
    assert np.abs(both[-1]["experts"] - both[0]["experts"]).max() > 0.05


def test_the_learning_rate_warms_up_twice() -> None:
    schedule = WarmupStableDecay(warmup=2, decay=0.2, final=0.0)
    rate = RouterFirst(optimizer=AdamW(learning_rate=1.0, schedule=schedule), steps=10).rate(steps=30)
    # Stage one: 10 steps, 2 of warm-up, the last 2 fall. Stage two: 20 steps, 2 of warm-up, the last 4 fall.
    expected = {0: 0.0, 1: 0.5, 2: 1.0, 8: 1.0, 9: 0.5, 10: 0.0, 11: 0.5, 12: 1.0, 26: 1.0, 28: 0.5}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected)


def test_a_model_without_routers_is_refused() -> None:
    params = state(np.random.default_rng(0), "experts")
    with pytest.raises(ValueError, match="optimizer is a RouterFirst, and the model has no router"):
        RouterFirst(optimizer=INNER, steps=STAGE).build(params, steps=STEPS)


def test_a_first_stage_of_no_steps_or_of_all_is_refused() -> None:
    with pytest.raises(ValueError, match="RouterFirst.steps is 0; it must be at least 1"):
        RouterFirst(steps=0)
    params = state(np.random.default_rng(0), *SHAPES)
    with pytest.raises(ValueError, match="RouterFirst.steps is 8; it must be below the run's steps, 8"):
        RouterFirst(optimizer=INNER, steps=8).build(params, steps=8)
