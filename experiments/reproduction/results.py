"""What came out of a reproduction: one JSON tree, from which the page and the picture are made."""

import datetime
from collections.abc import Sequence
from typing import Any

from ...models.accounting import count_parts
from ..serialization import to_json
from .claims import Finding, Numbers, verdict_of_all
from .comparing import Estimate
from .paper import Found, Paper

FACTS = ("versions", "system", "cores", "platform", "devices", "source", "validation_bytes")
"""Of a run's environment: what its numbers may depend on, and no name or path of the machine."""


def collect(
    found: Found, runs: Sequence[dict[str, Any]], step_time: dict[str, Any] | None, *, smoke: bool = False
) -> dict[str, Any]:
    """Everything that is known, judged.

    Args:
        found: the paper.
        runs: records of all runs, as `running.run_arms` returns them.
        step_time: what `running.time_steps` returned; None where no claim is about time.
        smoke: whether these are the numbers of a smoke test, which mean nothing.

    Returns:
        A tree of plain values: "paper", "title", "about", "date", "smoke", "seeds", "verdict", "findings", "arms" (size,
        cost and configuration), "runs", "step_time", and "environments", to which runs and step time refer by number.
    """
    environments: list[dict[str, Any]] = []

    def placed(record: dict[str, Any]) -> dict[str, Any]:
        facts = {name: record["environment"][name] for name in FACTS if name in record["environment"]}
        if facts not in environments:
            environments.append(facts)
        return {**record, "environment": environments.index(facts)}

    placed_runs = [placed(run) for run in runs]
    timed = None if step_time is None else placed(step_time) | {"measured": step_time["environment"]["started"]}
    numbers = numbers_of(runs, step_time)
    findings = [claim.judge(numbers) for claim in found.paper.claims]
    return {
        "paper": found.name,
        "title": found.paper.title,
        "about": found.paper.about.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "smoke": smoke,
        "seeds": sorted({run["seed"] for run in runs}),
        "verdict": verdict_of_all(findings),
        "findings": [finding._asdict() | {"estimate": finding.estimate._asdict()} for finding in findings],
        "arms": _arms(found.paper, smoke),
        "runs": placed_runs,
        "step_time": timed,
        "environments": environments,
    }


def numbers_of(runs: Sequence[dict[str, Any]], step_time: dict[str, Any] | None) -> Numbers:
    """What claims are judged on."""
    measures: dict[str, dict[str, dict[int, float | None]]] = {}
    for run in runs:
        for name, value in run["measures"].items():
            measures.setdefault(name, {}).setdefault(run["arm"], {})[run["seed"]] = value
    return Numbers(measures, {} if step_time is None else step_time["seconds"])


def findings_of(results: dict[str, Any]) -> list[Finding]:
    """The findings as the results hold them."""
    return [Finding(**{**finding, "estimate": Estimate(**finding["estimate"])}) for finding in results["findings"]]


def _arms(paper: Paper, smoke: bool) -> dict[str, Any]:
    arms = {}
    for name, experiment in paper.at(seed=0, smoke=smoke).items():
        total = count_parts(experiment.model, experiment.sequence_length)[-1]
        arms[name] = {
            "parameters": total.parameters,
            "active_parameters": total.active_parameters,
            "flops_per_token": total.flops,
            "tokens": experiment.steps * experiment.batch_size * experiment.sequence_length,
            "configuration": to_json(experiment),
        }
    return arms
