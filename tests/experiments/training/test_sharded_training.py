"""The same training on one device and on eight, however they are laid out; on eight fake CPU devices in one process."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from dynamoe.experiments.data import TextFiles, training_batches
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW, Muon, Optimizer
from dynamoe.experiments.training.restore import load_trained
from dynamoe.experiments.training.step import TrainState, build_trainer, to_device
from dynamoe.experiments.training.train import train
from dynamoe.models import Attention, Decoder, Dense, EveryNth, Layout, MeshShape
from dynamoe.moe import MoE, Router, RouterState, Routing, RoutingContext, SwiGLU
from dynamoe.moe.routing import assignment_counts

BATCH, LENGTH, STEPS = 16, 16, 5
LAYOUTS = {"8 x 1": MeshShape(data=8), "1 x 8": MeshShape(data=1, fsdp=8), "2 x 4": MeshShape(data=2, fsdp=4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced(Router):
    """Two experts by probability plus a bias, which follows the load of the whole batch."""

    experts_per_token = 2.0

    def build(self, *, width: int, experts: int, key: jax.Array) -> "BalancedRouter":
        return BalancedRouter(width, experts, key)


class BalancedRouter(nnx.Module):
    def __init__(self, width: int, experts: int, key: jax.Array):
        self.kernel = nnx.Param(jax.random.normal(key, (width, experts)) / width**0.5, axes=("embed", None))
        self.bias = RouterState(jnp.zeros(experts))

    def __call__(self, x: jax.Array, context: RoutingContext) -> tuple[Routing, dict[str, jax.Array]]:
        logits = x @ self.kernel[...]
        probs = jax.nn.softmax(logits, axis=-1)
        _, expert = jax.lax.top_k(probs + self.bias[...][None], 2)
        weight = jnp.where(context.mask[:, None], jnp.take_along_axis(probs, expert, axis=1), 0.0)
        expert = jnp.where(context.mask[:, None], expert, probs.shape[1])
        routing = Routing(expert.reshape(-1), weight.reshape(-1), None, logits, probs)
        count = assignment_counts(routing).astype(jnp.float32)
        return routing, {"bias": self.bias[...] + 0.1 * (count.mean() - count) / count.sum()}


MIXTURE = MoE(experts=4, router=Balanced(), expert=SwiGLU(hidden=16))
MODEL = Decoder(  # two scanned units of a dense layer and a mixture
    vocab=264,
    width=16,
    layers=4,
    attention=Attention(heads=2),
    ffn=EveryNth(ffn=MIXTURE, otherwise=Dense(hidden=32)),
)
PLAIN = dataclasses.replace(MODEL, layers=2, ffn=Dense(hidden=32))


def losses(
    optimizer: Optimizer, text: str, layout: Layout, start: TrainState | None, biases: list[np.ndarray]
) -> list[float]:
    """The losses of a few steps from `start`, or from the layout's own initialisation; appends the last bias."""
    trainer = build_trainer(MODEL, optimizer, layout, steps=STEPS)
    source, tokenizer = TextFiles(train=(text,), separator="\n\n"), Experiment(model=MODEL).tokenizer
    batches = training_batches(source, tokenizer, batch_size=BATCH, sequence_length=LENGTH, seed=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)
    state = trainer.init(jnp.uint32(0)) if start is None else jax.device_put(start, shardings)
    found = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, to_device(next(batches), layout))
        found.append(float(metrics["loss"]) + float(metrics["auxiliary_loss"]))
    biases.append(np.asarray(jax.tree.leaves(state.variables)[0]))
    embedding = state.params["embedding"].get_value()
    assert embedding.addressable_shards[0].data.shape == (264, 16 // layout.mesh.shape["fsdp"])
    assert int(state.step) == STEPS
    return found


def check_losses(text: str) -> None:
    assert len(jax.devices()) == 8
    cases = (  # Muon's functions take long to compile
        ("AdamW", AdamW(learning_rate=1e-2), LAYOUTS),
        ("Muon", Muon(learning_rate=1e-2), ("2 x 4",)),
    )
    for name, optimizer, shapes in cases:
        single = Layout(MeshShape(data=1).build(jax.devices()[:1]))
        start = jax.tree.map(np.asarray, build_trainer(MODEL, optimizer, single, steps=STEPS).init(jnp.uint32(0)))
        biases: list[np.ndarray] = []
        one = losses(optimizer, text, single, start, biases)
        assert np.abs(biases[0]).max() > 1e-3, "the routers remember something"
        assert one[-1] < one[0] - 0.1, "the model learns, or equal losses would say little"
        for shape in shapes:
            born_sharded = (name, shape) == ("AdamW", "2 x 4")  # once; initialising is half the time to compile
            found = losses(optimizer, text, Layout(LAYOUTS[shape].build()), None if born_sharded else start, biases)
            print(f"{name} on {shape}: {np.abs(np.subtract(found, one)).max():.1e} apart")
            np.testing.assert_allclose(found, one, rtol=0, atol=1e-5, err_msg=f"{name} on {shape}")
            np.testing.assert_allclose(biases[-1], biases[0], rtol=0, atol=1e-6, err_msg=f"{name} on {shape}")


def test_losses_on_eight_devices_are_those_on_one(run_with_devices: Callable[..., str], text: Path) -> None:
    print(run_with_devices(8, check_losses, str(text)))


def check_refusals_and_another_mesh(text: str, folder: str) -> None:
    nowhere = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    experiment = Experiment(
        model=PLAIN,
        source=TextFiles(train=(text,), separator="\n\n"),
        optimizer=AdamW(learning_rate=1e-2),
        mesh=MeshShape(data=2, fsdp=4),
        steps=4,
        batch_size=BATCH,
        sequence_length=LENGTH,
        evaluate_every=4,
        checkpoint_every=2,
        log_every=1,
    )

    def refuses(message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(experiment, **options), Path(folder) / "run", console=nowhere)
        assert not (Path(folder) / "run").exists()

    refuses("batch_size has length 12; it must be a multiple of 8 .*'data': 2, 'fsdp': 4", batch_size=12)
    refuses("length 4; it must be a multiple of 8", batch_size=16, gradient_accumulation=4)
    narrow = dataclasses.replace(PLAIN, width=12)
    refuses("'embed' of .* has length 12; it must be a multiple of 8", model=narrow, mesh=MeshShape(data=1, fsdp=8))
    refuses("'kv_heads' of .* has length 2; it must be a multiple of 4", mesh=MeshShape(data=2, tensor=4))
    refuses("'expert' of .* has length 4; it must be a multiple of 8", model=MODEL, mesh=MeshShape(data=1, expert=8))
    refuses("take 3 devices; 8 are there", mesh=MeshShape(data=3))

    whole = train(experiment, Path(folder) / "whole", console=nowhere)
    stopped = shutil.copytree(whole.path, Path(folder) / "moved")
    shutil.rmtree(stopped / "checkpoints" / "4")  # as if it had been killed after step 2
    moved = dataclasses.replace(experiment, mesh=MeshShape(data=8))
    again = train(moved, stopped, console=nowhere)
    assert again.step == 4
    np.testing.assert_allclose(again.bits_per_byte, whole.bits_per_byte, atol=1e-5)
    trained = load_trained(stopped)  # on one device
    for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(whole.state.params), strict=True):
        assert len(a.sharding.device_set) == 1
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)


def test_what_does_not_divide_is_refused_and_a_run_continues_on_another_mesh(
    run_with_devices: Callable[..., str], text: Path, tmp_path: Path
) -> None:
    run_with_devices(8, check_refusals_and_another_mesh, str(text), str(tmp_path))
