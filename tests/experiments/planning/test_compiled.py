"""What becomes of what a compiler says: a report, or that a step does not fit."""

import jax
import pytest

from dynamoe.experiments.planning import compiled
from dynamoe.experiments.planning.compiled import compile_step, training_step
from dynamoe.kernels.aot import Report


def report(step, *, temporary_bytes: int) -> Report:
    given = sum(step.categories.values())
    return Report(
        chip="h100:1x1x4",
        devices=4,
        argument_bytes=given + 100,
        output_bytes=given + 7,
        temporary_bytes=temporary_bytes,
        alias_bytes=given,
        flops=1.0,
        kernels=(),
        collectives=(),
        compile_seconds=0.1,
    )


@pytest.fixture
def step_and_mesh(tiny, on):
    placed = on("h100", "1x4", data=4)
    return training_step(tiny(), placed), placed


def test_what_the_compiler_adds_is_padding_and_results(step_and_mesh, monkeypatch):
    step, placed = step_and_mesh
    monkeypatch.setattr(compiled, "compile_for", lambda *_, **__: report(step, temporary_bytes=1000))
    memory, _, refusal = compile_step(step, placed)
    assert refusal is None and memory.fits
    assert (memory.padding, memory.results, memory.temporaries) == (100, 7, 1000)
    assert memory.total == sum(step.categories.values()) + 1107


def test_a_gpu_program_that_is_too_large_is_told(step_and_mesh, monkeypatch):
    step, placed = step_and_mesh
    monkeypatch.setattr(compiled, "compile_for", lambda *_, **__: report(step, temporary_bytes=90 * 10**9))
    memory, found, refusal = compile_step(step, placed)
    assert found is not None and not memory.fits
    assert refusal == "it takes 9.31 GiB more than a device has"


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Ran out of memory on HBM\nwith a trace", "INTERNAL: a bug"])
def test_a_tpu_compiler_that_runs_out_of_memory_is_told_and_other_errors_are_raised(
    step_and_mesh, monkeypatch, message
):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compiled, "compile_for", refuse)
    if message.startswith("INTERNAL"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            compile_step(*step_and_mesh)
    else:
        assert compile_step(*step_and_mesh) == (None, None, "Ran out of memory on HBM")
