"""Collectives by formulas, against examples computed by hand."""

import dataclasses

import pytest

from dynamoe.experiments.planning.formulas import by_formulas
from dynamoe.experiments.planning.search import abstract_state
from dynamoe.moe import AllGather, AllToAll, CapacityDispatcher, DroplessDispatcher, ExpertParallel, RaggedAllToAll


def exchanges(tiny, placed, **model):
    experiment = tiny()
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dtype="bfloat16", **model))
    found = by_formulas(experiment, abstract_state(experiment, placed.mesh), placed).exchanges
    return {(one.kind, one.axes): (one.bytes, one.times) for one in found}


# Of the tiny model, width 16: embedding and head 2 x 258 x 16, in each of two layers 4 x 16 x 16 of attention, 16 x 4
# of the router, 4 x 3 x 16 x 16 of experts and 2 norms of 16, and a last norm.
SPLIT = 2 * 258 * 16 + 2 * (4 * 256 + 64 + 2 * 16) + 16
EXPERTS = 2 * 12 * 256
TOKENS = 4 * 16 // 4  # of a device, where the batch is split in four


def test_fully_sharded_weights_are_gathered_in_each_pass_and_their_gradients_scattered(tiny, on):
    found = exchanges(tiny, on("v5e", "2x2", fsdp=4))
    assert found["all-gather", ("fsdp",)] == (2 * (SPLIT + EXPERTS), 2)
    assert found["reduce-scatter", ("fsdp",)] == (2 * (SPLIT + EXPERTS) / 4, 1)
    assert exchanges(tiny, on("v5e", "2x2", fsdp=4), remat=True)["all-gather", ("fsdp",)][1] == 3


def test_copied_weights_have_their_gradients_summed(tiny, on):
    found = exchanges(tiny, on("v5e", "2x2", data=4))
    assert found == {("all-reduce", ("data",)): (2 * (SPLIT + EXPERTS), 1)}


@pytest.mark.parametrize(
    ("exchange", "factor"),
    [(RaggedAllToAll(), 1), (AllToAll(capacity=CapacityDispatcher(capacity_factor=1.5)), 1.5)],
    ids=["ragged", "capacity"],
)
def test_tokens_go_to_their_experts_and_back(tiny, on, exchange, factor):
    ffn = dataclasses.replace(tiny().model.ffn, dispatcher=ExpertParallel(exchange=exchange))
    found = exchanges(tiny, on("v5e", "2x2", expert=4), ffn=ffn)
    # There and back, forward and backward, in each of 2 layers to the 2 experts of a token.
    assert found["all-to-all", ("expert",)] == (factor * 2 * 2 * TOKENS * 16 * 2, 4)
    assert found["all-reduce", ("expert",)] == (2 * SPLIT, 1)  # each device has its own experts
    assert ("all-gather", ("expert",)) not in found


def test_tokens_of_all_are_gathered_or_else_the_experts(tiny, on):
    mesh, ffn = on("v5e", "2x2", expert=4), tiny().model.ffn
    found = exchanges(tiny, mesh, ffn=dataclasses.replace(ffn, dispatcher=ExpertParallel(exchange=AllGather())))
    assert found["all-gather", ("expert",)] == (2 * 4 * TOKENS * 16 * 2, 2)  # 4 devices' tokens, in each of 2 layers
    assert found["reduce-scatter", ("expert",)] == (2 * TOKENS * 16 * 2, 2)
    found = exchanges(tiny, mesh, ffn=dataclasses.replace(ffn, dispatcher=DroplessDispatcher()))
    assert found["all-gather", ("expert",)] == (2 * EXPERTS, 2)
    assert found["reduce-scatter", ("expert",)] == (2 * EXPERTS / 4, 1)


def test_matrices_cut_in_parts_have_their_outputs_summed(tiny, on):
    found = exchanges(tiny, on("v5p", "2x2x1", tensor=2, data=2))
    # Of attention once, of two experts twice, in each layer, for half of the tokens.
    assert found["all-reduce", ("tensor",)] == (2 * (1 + 2) * 32 * 16 * 2, 2)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 4}, {"expert": 4}])
def test_model_flops_do_not_depend_on_the_mesh(tiny, on, axes):
    experiment, placed = tiny(), on("v5e", "2x2", **axes)
    other = on("v5e", "2x2", data=2, tensor=2)
    state = abstract_state(experiment, placed.mesh)
    here, there = (by_formulas(experiment, state, mesh).estimate for mesh in (placed, other))
    assert here.model_flops == there.model_flops > 0
