"""What a compiled step becomes in a plan."""

import dataclasses

import pytest

from dynamoe.experiments.planning import plan
from dynamoe.experiments.planning.compiled import Compiled, training_step
from dynamoe.experiments.planning.formulas import by_formulas
from dynamoe.experiments.planning.plan import plan_step
from dynamoe.experiments.planning.search import abstract_state
from dynamoe.kernels.aot import Report


@pytest.mark.parametrize("remat", [False, True])
def test_room_that_a_balanced_load_leaves_empty_is_not_executed(tiny, on, monkeypatch, remat):
    experiment, placed = tiny(), on("v5e", "2x2", data=4)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))
    step = training_step(experiment, placed)
    memory = by_formulas(experiment, abstract_state(experiment, placed.mesh), placed).memory
    # Two layers' experts of three matrices [16, 16], two for a token, of 4 x 16 tokens; forward, maybe again, backward.
    needed = 1.0 * (3 + remat) * 2 * 2 * 3 * 2 * 16 * 16 * 4 * 16

    def executed(ragged: float) -> float:
        report = Report(
            chip="v5e:2x2",
            devices=4,
            argument_bytes=0,
            output_bytes=0,
            temporary_bytes=0,
            alias_bytes=0,
            flops=10.0 * needed,
            ragged_flops=ragged,
            kernels=(),
            collectives=(),
            compile_seconds=0.1,
        )
        monkeypatch.setattr(plan, "compile_step", lambda *_: Compiled(memory, report, None))
        return plan_step(experiment, step, placed).estimate.executed_flops

    assert executed(2.5 * needed) == pytest.approx(8.5 * needed)  # room for 2.5 times the rows
    assert executed(needed) == executed(0.0) == 10.0 * needed
