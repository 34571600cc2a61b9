"""Real training and generation steps compiled for slices and boxes that are not here, and what a plan says of them."""

import dataclasses

import jax
import pytest

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.experiments.planning.compiled import Generation, generation_steps_of, training_step
from dynamoe.experiments.planning.placement import place
from dynamoe.experiments.planning.plan import StepPlan, plan_step
from dynamoe.experiments.planning.target import find_target
from dynamoe.models import Attention, Decoder, MeshShape
from dynamoe.moe import ExpertParallel, MoE, SwiGLU, TopK

WIDTH, HIDDEN, EXPERTS, CHOSEN, LAYERS, ROWS, LENGTH = 256, 512, 8, 2, 3, 16, 128
EXPERIMENT = Experiment(
    model=Decoder(
        vocab=512,
        width=WIDTH,
        layers=LAYERS,
        attention=Attention(heads=4),
        ffn=MoE(experts=EXPERTS, router=TopK(k=CHOSEN), expert=SwiGLU(hidden=HIDDEN), dispatcher=ExpertParallel()),
        dtype="bfloat16",
        remat=True,
    ),
    optimizer=AdamW(),
    batch_size=ROWS,
    sequence_length=LENGTH,
)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes bfloat16
        yield


def planned(chip: str, topology: str, experiment: Experiment = EXPERIMENT, **axes: int) -> StepPlan:
    placed = place(MeshShape(**{"data": 1} | axes), find_target(chip, topology))
    return plan_step(experiment, training_step(experiment, placed), placed)


def taken_in(plan: StepPlan, *kinds: str) -> float:
    return sum(one.wire_bytes for one in plan.exchanges if one.kind in kinds)


def assert_memory_is_whole(plan: StepPlan) -> None:
    memory = plan.memory
    assert plan.refusal is None and memory.fits and not memory.estimated
    assert memory.temporaries > 0 and memory.arguments["parameters"] > 0
    assert (memory.padding or 0) < 0.2 * sum(memory.arguments.values())


@pytest.mark.parametrize(("chip", "topology", "devices"), [("v5e", "2x2", 4), ("h100", "1x8", 8)])
def test_tokens_cross_to_their_experts_as_often_as_the_formula_says(chip, topology, devices):
    plan = planned(chip, topology, expert=devices)
    assert_memory_is_whole(plan)
    # There and back, forward, recomputed and backward, in every layer: a device's tokens, in 2 bytes, but for its own.
    by_hand = LAYERS * 6 * (ROWS * LENGTH / devices) * CHOSEN * WIDTH * 2 * (devices - 1) / devices
    assert taken_in(plan, "ragged-all-to-all") == by_hand
    assert {one.axes for one in plan.exchanges} == {("expert",)}
    assert plan.estimate is not None and plan.estimate.executed_flops is not None
    assert 0 < plan.estimate.overlapped < plan.estimate.serial
    assert plan.estimate.executed_flops > plan.estimate.model_flops


def test_fully_sharded_weights_are_gathered_as_often_as_the_formula_says():
    plan = planned("v6e", "2x2", fsdp=4)
    assert_memory_is_whole(plan)
    attention, experts = 4 * WIDTH**2, 3 * EXPERTS * WIDTH * HIDDEN
    # In bfloat16, three of four parts come in: attention's in three passes, and experts', which the backward pass finds
    # gathered by the recomputation, in two. Embedding, head and routers are below a tenth of it.
    by_hand = LAYERS * (3 * attention + 2 * experts) * 2 * 3 / 4
    assert by_hand < taken_in(plan, "all-gather") < 1.1 * by_hand
    scattered = LAYERS * (attention + experts) * 2 * 3 / 4
    assert 0.9 * scattered < taken_in(plan, "reduce-scatter") < 1.1 * scattered


def test_what_does_not_fit_is_told_with_the_memory_by_formulas():
    long = dataclasses.replace(EXPERIMENT, sequence_length=32_768, batch_size=4)
    plan = planned("v5e", "2x2", long, data=4)
    assert plan.by_formulas and plan.memory.estimated and not plan.memory.fits
    assert plan.refusal is not None and "exceeds available" in plan.refusal
    assert plan.memory.arguments["parameters"] > 0 and plan.estimate is not None


def test_generation_is_planned_with_its_cache():
    placed = place(MeshShape(data=2, expert=2), find_target("v5e"))
    prefill, decoding = generation_steps_of(EXPERIMENT, Generation(rows=8, prompt=32, tokens=32), placed)
    cache = (
        LAYERS * 2 * 64 * (2 * WIDTH * 2 + 1) + 8 * 4
    )  # two rows of 64 slots: keys, values, whether valid; all lengths
    assert prefill.categories["key-value cache"] == decoding.categories["key-value cache"] == cache
    plan = plan_step(EXPERIMENT, decoding, placed)
    assert_memory_is_whole(plan)
    assert plan.memory.results <= 1024  # the cache is written in place
