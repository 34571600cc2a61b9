"""`dynamoe bench training_step`: the demo's mixture against its dense twin, after a check of its loss and gradient."""

import dataclasses
import math

import jax.numpy as jnp
from rich.console import Console

from ...models import Layout, MeshShape
from ...models.accounting import count_parts
from ...moe import DenseDispatcher
from ..data import training_batches
from ..recipes import standard_library, standard_library_dense
from ..training.step import build_trainer, to_device
from ..training.step_time import step_seconds

STEP_ERROR = 1e-4
"""Allowed difference of a step's loss and gradient norm from those of the dense dispatcher, as a part of them."""


def bench_step(rounds: int, console: Console) -> int:
    """The default recipe's mixture of experts over its dense twin, of equal active FLOPs per token."""
    dense, mixture = standard_library_dense.recipe(), standard_library.recipe()
    ffn = dataclasses.replace(mixture.model.ffn, dispatcher=DenseDispatcher())
    oracle = dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, ffn=ffn))
    sizes = {"batch_size": mixture.batch_size, "sequence_length": mixture.sequence_length}
    batch = next(training_batches(mixture.source, mixture.tokenizer, **sizes, seed=mixture.seed))
    trainers = {
        name: build_trainer(e.model, e.optimizer, Layout(MeshShape().build()), steps=e.steps)
        for name, e in (("dense", dense), ("mixture", mixture), ("oracle", oracle))
    }
    worst = 0.0
    ours, oracles = (
        trainer.step(trainer.init(jnp.uint32(mixture.seed)), to_device(batch, trainer.layout))[1]
        for trainer in (trainers["mixture"], trainers["oracle"])
    )
    for name in ("loss", "gradient_norm"):
        found, expected = float(ours[name]), float(oracles[name])
        error = abs(found / expected - 1)
        worst = max(worst, error if math.isfinite(error) else math.inf)
        console.print(f"{name} {found:.6f}, with every expert on every token {expected:.6f}", highlight=False)
    if worst > STEP_ERROR:
        console.print(f"they differ by {worst:.1e}, allowed is {STEP_ERROR:.0e}: nothing is timed", highlight=False)
        return 1
    runs = {name: (trainers[name], trainers[name].init(jnp.uint32(0))) for name in ("dense", "mixture")}
    seconds = step_seconds(runs, batch, rounds=rounds)
    for name, e in (("dense", dense), ("mixture", mixture)):
        flops = count_parts(e.model, e.sequence_length)[-1].flops
        console.print(f"{name}: {flops:,.0f} FLOPs per token, {seconds[name] * 1e3:.0f} ms a step", highlight=False)
    console.print(
        f"a training step of the mixture takes {seconds['mixture'] / seconds['dense']:.2f} times the dense model's "
        f"(medians of {rounds} steps in turns)",
        highlight=False,
    )
    return 0
