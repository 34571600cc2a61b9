"""Compile the steps of an experiment for devices that are not here: training, and generation's two.

They are the very functions that `dynamoe train` and `models.generation` run, over abstract arrays with the shardings
that the layout gives them.
"""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ...kernels.aot import Report, compile_for
from ...models import Layout
from ...models.generation import Categorical
from ...models.generation.programs import Chunk, empty_rows, programs, shapes_of, shardings_of
from ..experiment import Experiment
from ..training.step import build_trainer
from .memory import Memory, abstract_batch, capacity, generation_arguments, training_arguments
from .placement import PlacedMesh


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The sizes of generation that are planned for."""

    rows: int | None = None
    """Prompts at once; none: the recipe's batch_size."""
    prompt: int | None = None
    """Tokens of each; none: the recipe's sequence_length."""
    tokens: int = 128
    """New tokens that the cache has room for."""

    def __post_init__(self):
        for name in ("rows", "prompt", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"generation.{name} is {value}; it must be at least 1")


class Step(NamedTuple):
    """A step to compile: a jitted function and its abstract arguments."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    params: nnx.State
    """The parameters among them."""
    categories: dict[str, int]
    """Bytes of the arguments on one device."""
    tokens: int
    """That it works on, over all devices."""
    context: int
    """Tokens that each of them may attend to."""
    passes: int
    """Forward passes' worth of the model's flops."""


class Compiled(NamedTuple):
    """What came of compiling a step."""

    memory: Memory | None
    """None where the compiler refused the step before it said what it takes."""
    report: Report | None
    """None where it does not fit."""
    refusal: str | None


def training_step(experiment: Experiment, placement: PlacedMesh) -> Step:
    """The step of `dynamoe train`.

    Raises:
        ValueError: an axis of a parameter or the batch does not divide over the mesh; it is named.
    """
    layout = Layout(placement.mesh, experiment.rules)
    batch = abstract_batch(experiment, layout)
    trainer = build_trainer(
        experiment.model,
        experiment.optimizer,
        layout,
        steps=experiment.steps,
        accumulation=experiment.gradient_accumulation,
    )
    return Step(
        "training step",
        trainer.step,
        (trainer.abstract_state, batch),
        trainer.abstract_state.params,
        training_arguments(trainer.abstract_state, batch),
        tokens=experiment.batch_size * experiment.sequence_length,
        context=experiment.sequence_length,
        passes=3,
    )


def generation_steps_of(experiment: Experiment, sizes: Generation, placement: PlacedMesh) -> list[Step]:
    """Prefill and one step of decoding, with the parameters as training stores them, unstacked.

    Raises:
        ValueError: an axis of a parameter, of the cache or the rows do not divide over the mesh; it is named.
    """
    rows = sizes.rows or experiment.batch_size
    prompt = sizes.prompt or experiment.sequence_length
    slots = prompt + sizes.tokens
    layout = Layout(placement.mesh, experiment.rules)
    model = nnx.eval_shape(lambda: experiment.model.build(jax.random.key(0), stacked=False))
    graph, state = nnx.split(model)
    params = _placed(state, layout.shardings(state))
    leaves, structure = jax.tree.flatten(params)
    sampler = Categorical()
    held = jax.eval_shape(lambda: empty_rows(model, rows=rows, slots=slots, sampler=sampler, layout=None))
    layout.batch(rows, 1, "generation.rows")
    held = _placed(held, shardings_of(held, layout))
    steps = programs(graph, structure, sampler, experiment.model.vocab, layout, shapes_of(held))

    def whole(*shape: int, dtype: Any = jnp.int32) -> Any:
        return _abstract(shape, dtype, jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec()))

    key = whole(*held.key.shape, dtype=held.key.dtype)
    chunk = Chunk(whole(rows, prompt), whole(rows), whole(rows), key, None)
    active, rest = whole(rows, dtype=bool), (held.token, held.drawn, held.key)
    return [
        Step(
            "prefill",
            steps.read,
            (leaves, held, chunk),
            params,
            generation_arguments(params, held.cache, (rest, chunk)),
            tokens=rows * prompt,
            context=slots,
            passes=1,
        ),
        Step(
            "decoding step",
            steps.draw,
            (leaves, held, active),
            params,
            generation_arguments(params, held.cache, (rest, active)),
            tokens=rows,
            context=slots,
            passes=1,
        ),
    ]


def compile_step(step: Step, placement: PlacedMesh) -> Compiled:
    """Compile a step. Not to fit is an outcome and no error: a TPU's compiler refuses then, a GPU's does not."""
    try:
        with dying_at_once():
            report = compile_for(placement.target.name, step.function, *step.arguments, mesh=placement.mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(None, None, _first_line(str(error)))
    given = sum(step.categories.values())
    memory = Memory(
        arguments=step.categories,
        padding=max(0, report.argument_bytes - given),
        results=max(0, report.output_bytes - report.alias_bytes),
        temporaries=report.temporary_bytes,
        estimated=False,
        capacity=capacity(placement.target.chip),
    )
    refusal = None if memory.fits else f"it takes {-memory.margin / 2**30:.2f} GiB more than a device has"
    return Compiled(memory, report, refusal)


@contextlib.contextmanager
def dying_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process, status 130, while a compiler runs that would not hear of it for minutes.

    Nothing is being written meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _first_line(message: str) -> str:
    """The compiler's first sentence, which says what is missing."""
    line = message.strip().splitlines()[0]
    return re.sub(r"^RESOURCE_EXHAUSTED: ", "", line)[:300]


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, sharding: _abstract(a.shape, a.dtype, sharding), tree, shardings)


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
