"""The plan of one mesh: each step compiled, its memory weighed, its time estimated."""

from collections import defaultdict
from typing import NamedTuple

from ...kernels.aot import Report
from ...models.accounting import count_parts
from ..experiment import Experiment
from .compiled import Compiled, Step, compile_step
from .formulas import by_formulas, hbm_bytes, needed_flops, weights_in_use
from .memory import Memory, capacity
from .placement import PlacedMesh
from .roofline import Estimate, Exchange, estimate, exchanges_of


class StepPlan(NamedTuple):
    """One step on one mesh."""

    name: str
    tokens: int
    """That it works on, over all devices."""
    memory: Memory
    estimate: Estimate | None
    """None where nothing could be counted: generation that did not fit."""
    exchanges: list[Exchange]
    compile_seconds: float | None
    """None: the compiler refused it, and all figures but the arguments are by formulas."""
    refusal: str | None
    """Why it does not fit."""

    @property
    def by_formulas(self) -> bool:
        return self.compile_seconds is None

    def exchanges_by_axes(self) -> list[Exchange]:
        """One entry for each kind and mesh axes, all its bytes of a step summed, the slowest first."""
        groups: dict[tuple, list[Exchange]] = defaultdict(list)
        for one in self.exchanges:
            groups[one.kind, one.axes].append(one)
        summed = [
            Exchange(
                kind,
                sum(one.bytes * (one.times or 1) for one in group),
                axes,
                None if None in [one.times for one in group] else sum(one.times or 0 for one in group),
                sum(one.wire_bytes for one in group),
                sum(one.seconds for one in group),
            )
            for (kind, axes), group in groups.items()
        ]
        return sorted(summed, key=lambda one: -one.seconds)


def plan_step(experiment: Experiment, step: Step, placement: PlacedMesh) -> StepPlan:
    """Compile a step and say what it takes. Where it does not fit, formulas say about how much it would."""
    compiled = compile_step(step, placement)
    if compiled.memory is None or compiled.report is None:
        return _refused(experiment, step, placement, compiled)
    report, training = compiled.report, step.passes == 3
    exchanges = exchanges_of(report.collectives, placement)
    weights = weights_in_use(experiment, step.params, placement)
    model_flops = _model_flops(experiment, step)
    time = estimate(
        placement,
        model_flops=model_flops,
        needed_flops=needed_flops(experiment) if training else model_flops,
        executed_flops=_executed_flops(experiment, step, report),
        hbm_bytes=hbm_bytes(experiment, compiled.memory, weights, training=training),
        exchanges=exchanges,
    )
    return StepPlan(step.name, step.tokens, compiled.memory, time, exchanges, report.compile_seconds, compiled.refusal)


def _refused(experiment: Experiment, step: Step, placement: PlacedMesh, compiled: Compiled) -> StepPlan:
    if step.passes != 3:
        bare = Memory(step.categories, None, 0, 0, True, capacity(placement.target.chip))
        return StepPlan(step.name, step.tokens, bare, None, [], None, compiled.refusal)
    found = by_formulas(experiment, step.arguments[0], placement)
    return StepPlan(step.name, step.tokens, found.memory, found.estimate, found.exchanges, None, compiled.refusal)


def _executed_flops(experiment: Experiment, step: Step, report: Report) -> float | None:
    """The program's own, where ragged products skip what a balanced load leaves empty of the room for it."""
    if report.flops is None or not report.ragged_flops:
        return report.flops
    passes = step.passes + (experiment.model.remat if step.passes == 3 else 0)
    experts = sum(part.flops for part in count_parts(experiment.model, step.context) if part.name == "experts")
    return report.flops - max(0.0, report.ragged_flops - passes * experts * step.tokens)


def _model_flops(experiment: Experiment, step: Step) -> float:
    """What the model asks for, over all devices."""
    return step.passes * count_parts(experiment.model, step.context)[-1].flops * step.tokens
