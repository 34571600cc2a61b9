"""A plan as tables for a terminal, as a page in Markdown, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...kernels.aot import readable_bytes
from ..page import Table
from .placement import PlacedMesh
from .plan import StepPlan
from .roofline import Estimate, assumptions
from .search import Candidate, Search


def memory_table(plan: StepPlan) -> Table:
    """What fills a device, by category."""
    memory = plan.memory
    rows = [(name, readable_bytes(size), f"{size / memory.capacity:.1%}") for name, size in memory.parts().items()]
    by = "temporaries are an estimate by formulas" if memory.estimated else "temporaries are the compiler's"
    left = f"{readable_bytes(abs(memory.margin))} {'left' if memory.fits else 'MISSING'}"
    left += f" of {readable_bytes(memory.capacity)}"
    total = ("total", readable_bytes(memory.total), f"{memory.total / memory.capacity:.1%}")
    caption = (
        f"{plan.name}, one device: {left}. Arguments are exact; {by}: activations, gradients, gathered weights and "
        "buffers of collectives."
    )
    return Table(("memory", "bytes", "of a device"), [*rows, total], caption, total=True)


def collectives_table(plan: StepPlan) -> Table:
    """Collectives of a step, by kind and mesh axes."""
    rows = [
        (
            one.kind,
            "not known" if one.axes is None else " x ".join(one.axes) or "one device",
            "not known" if one.times is None else f"{one.times:,.0f}",
            readable_bytes(one.bytes),
            readable_bytes(one.wire_bytes),
            _milliseconds(one.seconds),
        )
        for one in plan.exchanges_by_axes()
    ]
    how = "by formulas" if plan.by_formulas else "read from the compiled program, loops with their lengths"
    caption = (
        f"{plan.name}, one device, {how}. Bytes are those of the results; on the wire are those that the device has to "
        "take in; the time is an estimate."
    )
    columns = ("collective", "over", "times", "bytes", "on the wire", "at least")
    return Table(columns, rows, caption)


def estimate_table(plan: StepPlan) -> Table:
    """The roofline of a step."""
    time = plan.estimate
    assert time is not None
    rows = [
        ("matrix products that it needs, at the peak", _milliseconds(time.compute)),
        ("matrix products that it executes", _milliseconds(time.executed)),
        ("memory, at least", _milliseconds(time.memory)),
        ("collectives, at least", _milliseconds(time.network)),
        ("step, everything overlapped", _milliseconds(time.overlapped)),
        ("step, nothing overlapped", _milliseconds(time.serial)),
        ("utilization by the model's flops", _range(time.utilization(time.serial), time.utilization(time.overlapped))),
        ("utilization by executed flops", _executed(time)),
        ("tokens per second", f"{plan.tokens / time.serial:,.0f} to {plan.tokens / time.overlapped:,.0f}"),
        ("model flops", f"{time.model_flops:.4g}"),
        ("executed flops", "not known" if time.executed_flops is None else f"{time.executed_flops:.4g}"),
    ]
    caption = f"{plan.name}: an estimate, not a measurement. Flops are over all devices."
    return Table(("estimate", "value"), rows, caption)


def search_table(search: Search) -> Table:
    """Every mesh, best first."""
    rows = []
    for place, candidate in enumerate(search.candidates, 1):
        memory, time = candidate.formulas.memory, candidate.formulas.estimate
        plan = candidate.compiled if candidate.compiled and not candidate.compiled.by_formulas else None
        compiled = (readable_bytes(plan.memory.total), _span(plan.estimate)) if plan is not None else ("", "")
        row = (place, candidate.name, readable_bytes(memory.total), compiled[0], _span(time), compiled[1])
        rows.append((*map(str, row), _verdict(candidate)))
    caption = (
        "Memory of one device; times are estimates: everything overlapped, and nothing overlapped. Ranked by the "
        f"latter, of the compiled program if there is one. {len(search.refused)} more meshes do not divide the "
        f"experiment; {search.unheld} cannot be laid over these devices."
    )
    return Table(("rank", "mesh", "memory", "compiled", "ms", "compiled", ""), rows, caption)


def page(title: str, command: str, placement: PlacedMesh, plans: Sequence[StepPlan], search: Search | None) -> str:
    """The plan as a page, with its pictures beside it.

    Args:
        title: what was planned for what.
        command: that made it.
        placement: of the mesh that is shown in detail.
        plans: its steps.
        search: the comparison of meshes, where there was one.
    """
    mesh = " ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
    parts = [f"# {title}", f"Made by `{command}`. Mesh: {mesh}.", "![Memory by category](memory.png)"]
    if any(plan.estimate is not None for plan in plans):
        parts.append("![Time, an estimate](time.png)")
    if search is not None:
        parts += ["## Meshes", _markdown(search_table(search))]
    for plan in plans:
        parts += [f"## {plan.name.capitalize()}", *([f"**It does not fit: {plan.refusal}**"] if plan.refusal else [])]
        parts += [_markdown(table) for table in tables(plan)]
    parts += ["## What the estimates assume", "\n".join(f"- {line}" for line in assumptions(placement.target.chip))]
    return "\n\n".join(parts) + "\n"


def tables(plan: StepPlan) -> list[Table]:
    """All that is known of a step."""
    found = [memory_table(plan)]
    if plan.exchanges:
        found.append(collectives_table(plan))
    return [*found, *([estimate_table(plan)] if plan.estimate is not None else [])]


def as_json(placement: PlacedMesh, plans: Sequence[StepPlan], search: Search | None) -> dict[str, Any]:
    """The plan as data."""
    data: dict[str, Any] = {
        "chip": placement.target.chip,
        "topology": placement.target.topology,
        "devices": placement.mesh.size,
        "mesh": dict(placement.mesh.shape),
        "steps": [_step(plan) for plan in plans],
        "assumptions": assumptions(placement.target.chip),
    }
    if search is not None:
        data["meshes"] = [
            {
                "mesh": dataclasses.asdict(candidate.shape),
                "by_formulas": _figures(candidate.formulas.memory.parts(), candidate.formulas.estimate),
                "compiled": None if candidate.compiled is None else _step(candidate.compiled),
                "fits": candidate.fits,
            }
            for candidate in search.candidates
        ]
        data["do_not_divide"] = [{"mesh": dataclasses.asdict(shape), "why": why} for shape, why in search.refused]
        data["not_held"] = search.unheld
    return data


def _step(plan: StepPlan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "tokens": plan.tokens,
        "refusal": plan.refusal,
        "by_formulas": plan.by_formulas,
        "compile_seconds": plan.compile_seconds,
        "capacity": plan.memory.capacity,
        **_figures(plan.memory.parts(), plan.estimate),
        "collectives": [one._asdict() for one in plan.exchanges],
    }


def _figures(memory: dict[str, int], time: Estimate | None) -> dict[str, Any]:
    estimate = None
    if time is not None:
        estimate = time._asdict() | {"overlapped": time.overlapped, "serial": time.serial}
    return {"memory": memory, "estimate": estimate}


def _verdict(candidate: Candidate) -> str:
    if candidate.compiled is None:
        return "not compiled" if candidate.fits else "should not fit"
    return "compiled" if candidate.fits else "does not fit"


def _span(time: Estimate | None) -> str:
    return "" if time is None else f"{1e3 * time.overlapped:.3g}, {1e3 * time.serial:.3g}"


def _executed(time: Estimate) -> str:
    low, high = time.executed_utilization(time.serial), time.executed_utilization(time.overlapped)
    return "not known" if low is None or high is None else _range(low, high)


def _range(low: float, high: float) -> str:
    return f"{low:.1%} to {high:.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"


def _markdown(table: Table) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, ["---"] * len(table.columns), *table.cells)]
    return "\n".join(lines) + f"\n\n{table.caption}"
