"""The page of a reproduction, in Markdown, made from its results and nothing else."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .claims import STEP_TIME, Finding
from .comparing import median_ratio, t_quantile
from .results import findings_of

RULE = (
    "The rule, written into the paper's file before the runs: a claim says that a quantity lies below a bound. It is "
    "reproduced where the whole 95% interval lies below the bound, not reproduced where the whole interval lies at or "
    "above it, and inconclusive otherwise. The paper is reproduced where every claim is, not reproduced where one is "
    "not, and inconclusive otherwise. No correction is made for several claims."
)


def write_page(results: dict[str, Any], file: Path) -> Path:
    """Write the page beside its picture, which has the same name."""
    write_atomically(file, page(results))
    return file


def page(results: dict[str, Any]) -> str:
    """The page as text."""
    name, findings = results["paper"], findings_of(results)
    parts = [
        f"# {results['title']}",
        f"Made by `dynamoe reproduce {name} --render` from `{name}.json`; not to be edited.",
        _smoke_warning(results),
        f"**{results['verdict'].capitalize()}**, on {results['date']}, with {len(results['seeds'])} seeds "
        f"({', '.join(map(str, results['seeds']))}).",
        f"![Runs by arm, and what was claimed of them]({name}.png)",
        "## Claims",
        _claims(findings),
        f"{_how_sure(results, findings)}\n\n{RULE}",
        "## Arms",
        _arms(results),
        "Means over the seeds ± standard deviation. FLOPs are those of a token's forward pass, dropped or not.",
        *_step_times(results, findings),
        "## Runs",
        _runs(results),
        f"Seconds are of training and measuring, on a machine that may have had other work. {_environments(results)}",
        "## The paper's file",
        f"```text\n{results['about']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _smoke_warning(results: dict[str, Any]) -> str:
    return "**These are the numbers of a smoke test. They mean nothing.**" if results["smoke"] else ""


def _claims(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        value, low, high, _, detectable = finding.estimate
        form = ".3f" if finding.measure == STEP_TIME else "+.4f"
        seen = "" if detectable is None else f"{detectable:.4f}"
        rows.append(
            (
                finding.claim,
                finding.published,
                finding.quantity,
                format(value, form),
                f"{low:{form}} to {high:{form}}",
                seen,
                f"below {finding.bound:g}",
                f"**{finding.verdict}**",
            )
        )
    columns = ("claim", "paper", "measured here", "estimate", "95% interval", "detectable", "claimed", "verdict")
    return table(columns, rows)


def _how_sure(results: dict[str, Any], findings: Sequence[Finding]) -> str:
    seeds, sentences = len(results["seeds"]), []
    if any(finding.measure != STEP_TIME for finding in findings):
        sentences.append(
            "Differences are means over runs paired by seed (the same batches in the same order), with Student's t "
            f"interval. {seeds} pairs are few: the interval reaches {t_quantile(0.975, seeds - 1):.1f} standard errors "
            "to either side, and takes the differences to be normal. Detectable is the smallest true difference that "
            "so many pairs of this spread would tell from 0 in four of five repetitions (80% power at 5%)."
        )
    if any(finding.measure == STEP_TIME for finding in findings):
        sentences.append("Step times are medians of ratios within a round, with an interval of their order.")
    return " ".join(sentences)


def _arms(results: dict[str, Any]) -> str:
    names = _measures(results)
    rows = []
    for arm, size in results["arms"].items():
        values = [[run["measures"][name] for run in results["runs"] if run["arm"] == arm] for name in names]
        rows.append(
            (
                f"`{arm}`",
                f"{size['parameters']:,}",
                f"{size['active_parameters']:,.0f}",
                f"{size['flops_per_token']:,.0f}",
                f"{size['tokens']:,}",
                *map(_mean, values),
            )
        )
    return table(("arm", "parameters", "active", "FLOPs per token", "tokens trained on", *names), rows)


def _step_times(results: dict[str, Any], findings: Sequence[Finding]) -> list[str]:
    if results["step_time"] is None:
        return []
    seconds = results["step_time"]["seconds"]
    rounds = len(next(iter(seconds.values())))
    first = next(finding for finding in findings if finding.measure == STEP_TIME)
    base = first.quantity.split(", ")[1].split(" / ")[0]
    rows = []
    for arm, times in seconds.items():
        value, low, high, _, _ = median_ratio(times, seconds[base])
        spread = "" if arm == base else f"{low:.3f} to {high:.3f}"
        rows.append((f"`{arm}`", f"{1e3 * statistics.median(times):.1f}", f"{value:.3f}", spread))
    return [
        "## Step time",
        table(("arm", "median, ms", f"time, {base} = 1", "95% interval"), rows),
        f"{rounds} training steps of each arm, in turns in one process, on one batch, from fresh parameters, after one "
        f"step that is not timed. Measured {results['step_time']['measured']}.",
    ]


def _runs(results: dict[str, Any]) -> str:
    names = _measures(results)
    rows = []
    for run in results["runs"]:
        values = ["–" if run["measures"][name] is None else f"{run['measures'][name]:.4f}" for name in names]
        seconds = "continued" if run["seconds"] is None else f"{run['seconds']:.0f}"
        rows.append((f"`{run['arm']}`", str(run["seed"]), *values, seconds, run["finished"]))
    return table(("arm", "seed", *names, "seconds", "finished"), rows)


def _environments(results: dict[str, Any]) -> str:
    sentences = []
    for facts in results["environments"]:
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        devices = ", ".join(sorted(set(facts["devices"])))
        sentences.append(f"{versions}; {facts['system']}, {facts.get('cores', '?')} cores, {devices}.")
    several = "" if len(sentences) == 1 else f"Not all runs had the same surroundings; there were {len(sentences)}: "
    return several + " ".join(sentences)


def _measures(results: dict[str, Any]) -> list[str]:
    return list(results["runs"][0]["measures"])


def _mean(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    return f"{statistics.fmean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; columns that hold nothing but numbers stand flush right."""
    rules = ["---:" if all(_is_number(row[i]) for row in rows) else "---" for i in range(len(columns))]
    lines = [columns, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _is_number(text: str) -> bool:
    return text in ("", "–") or (text[0] in "+-0123456789" and not any(letter.isalpha() for letter in text))
