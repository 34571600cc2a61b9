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
        A tree of plain values: "paper", "title", "about", "date", "smoke", "seeds", "verdict", "findings", "arms"
        (size, cost and configuration), "runs", "step_time", and "environments", to which runs and step time refer by
        number.
    """
    results = {
        "paper": found.name,
        "title": found.paper.title,
        "about": found.paper.about.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "smoke": smoke,
        "seeds": sorted({run["seed"] for run in runs}),
        "arms": _arms(found.paper, smoke),
        "environments": [],
    }
    results["runs"] = [_placed(run, results["environments"]) for run in runs]
    return with_step_time(found.paper, results, step_time)


def with_step_time(paper: Paper, results: dict[str, Any], step_time: dict[str, Any] | None) -> dict[str, Any]:
    """The same results with these step times, judged anew."""
    environments = list(results["environments"])
    if step_time is not None:
        measured = step_time["environment"]["started"]
        step_time = _placed(step_time, environments) | {"measured": measured}
    results = {**results, "environments": environments, "step_time": step_time}
    findings = judge(paper, results)
    return results | {
        "verdict": verdict_of_all(findings),
        "findings": [finding._asdict() | {"estimate": finding.estimate._asdict()} for finding in findings],
    }


def judge(paper: Paper, results: dict[str, Any]) -> list[Finding]:
    """What the paper's rule says of the runs and step times."""
    measures: dict[str, dict[str, dict[int, float | None]]] = {}
    for run in results["runs"]:
        for name, value in run["measures"].items():
            measures.setdefault(name, {}).setdefault(run["arm"], {})[run["seed"]] = value
    timed = results["step_time"]
    numbers = Numbers(measures, {} if timed is None else timed["seconds"])
    return [claim.judge(numbers) for claim in paper.claims]


def findings_of(results: dict[str, Any]) -> list[Finding]:
    """The findings that the results hold."""
    return [Finding(**{**finding, "estimate": Estimate(**finding["estimate"])}) for finding in results["findings"]]


def _placed(record: dict[str, Any], environments: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with the number of its environment, which is added to the others where it is new."""
    facts = {name: record["environment"][name] for name in FACTS if name in record["environment"]}
    same = [number for number, other in enumerate(environments) if facts.items() <= other.items()]
    if not same:
        environments.append(facts)
    return {**record, "environment": same[0] if same else len(environments) - 1}


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
