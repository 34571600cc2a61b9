"""The losses and gradients of a training run are the same on every mesh, for every dispatcher, also where it drops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamoe.experiments.data import TextFiles, training_batches
from dynamoe.experiments.serialization import call_recipe
from dynamoe.experiments.training.step import ROUTERS, TrainState, build_trainer, to_device
from dynamoe.models import Layout, MeshShape

RECIPE = Path(__file__).with_name("every_dispatcher.py")
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)]
"""data x fsdp x expert x tensor."""
STEPS = 3


def steps(layout: Layout, text: str, start: TrainState | None) -> tuple[list[dict[str, Any]], TrainState, TrainState]:
    """The metrics of a few steps, the state before and the one after them."""
    experiment: Any = call_recipe(RECIPE)
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=STEPS)
    sizes = {"batch_size": experiment.batch_size, "sequence_length": experiment.sequence_length}
    source = TextFiles(train=(text,), separator="\n\n")
    batches = training_batches(source, experiment.tokenizer, **sizes, seed=0)
    start = jax.tree.map(np.asarray, trainer.init(jnp.uint32(0)) if start is None else start)
    state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state))
    found = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, to_device(next(batches), layout))
        found.append(jax.tree.map(np.asarray, metrics))
    return found, start, state


def check_meshes(text: str) -> None:
    one, start, end = steps(Layout(MeshShape(data=1).build(jax.devices()[:1])), text, None)
    dropping = [layer for layer in range(14) if one[0][ROUTERS][f"layers.{layer}.dropped"] > 0.05]
    assert dropping == [1, 3, 4, 8, 10, 11]
    assert one[-1]["loss"] < one[0]["loss"] - 0.05, "the model learns, or equal losses would say little"
    for shape in MESHES:
        mesh = MeshShape(**dict(zip(("data", "fsdp", "expert", "tensor"), shape, strict=True)))
        found, _, last = steps(Layout(mesh.build()), text, start)
        for step, (metrics, wanted) in enumerate(zip(found, one, strict=True)):
            for (path, a), b in zip(jax.tree.leaves_with_path(metrics), jax.tree.leaves(wanted), strict=True):
                message = f"{jax.tree_util.keystr(path)} of step {step + 1} on {shape}"
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=message)
        for a, b in zip(jax.tree.leaves(last.variables), jax.tree.leaves(end.variables), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        print(shape, [float(metrics["loss"] - wanted["loss"]) for metrics, wanted in zip(found, one, strict=True)])


def test_losses_and_gradients_on_every_mesh_are_those_on_one_device(
    run_with_devices: Callable[..., str], text: Path
) -> None:
    print(run_with_devices(8, check_meshes, str(text), timeout=600.0))
