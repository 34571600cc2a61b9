"""Every recipe of a published model, compiled for all the devices that it is written for.

    python -m dynamoe.experiments.planning.published [NAME ...]

Each is compiled by `dynamoe plan` in a process of its own, one after the other. Printed are what is left of a device's
memory, the estimate of a step, and what compiling took. Status 1: a recipe does not fit, or its compiling takes more
than `CPU_MINUTES` or `GIGABYTES`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PUBLISHED = {
    "mixtral_8x7b": ("v5p", "4x4x4"),
    "mixtral_8x7b_v6e": ("v6e", "8x8"),
    "mixtral_8x7b_h100": ("h100", "8x8"),
    "olmoe_1b_7b": ("v5p", "4x4x4"),
    "olmoe_1b_7b_v6e": ("v6e", "8x8"),
    "olmoe_1b_7b_h100": ("h100", "4x8"),
    "qwen3_30b_a3b": ("v5p", "4x4x4"),
    "qwen3_30b_a3b_v6e": ("v6e", "16x16"),
    "qwen3_30b_a3b_h100": ("h100", "8x8"),
}
"""The chip and the topology of each recipe; of GPUs hosts x devices of each."""
CPU_MINUTES, GIGABYTES = 6.0, 6.0
"""What compiling one may take, on two cores."""
RECIPES = Path(__file__).parents[1] / "recipes"
_COMMAND = "from dynamoe.experiments.cli import main; main()"


class Cost(NamedTuple):
    """Of compiling one recipe."""

    status: int
    cpu_minutes: float
    gigabytes: float
    """The most that the process held at once."""


def compile_recipe(name: str, folder: Path) -> Cost:
    """Run `dynamoe plan` on a recipe; the plan is written into the folder."""
    chip, topology = PUBLISHED[name]
    arguments = ["plan", str(RECIPES / f"{name}.py"), "--chip", chip, "--topology", topology, "--output", str(folder)]
    with open(folder / "log.txt", "w") as log:
        child = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return Cost(child.returncode, (used.ru_utime + used.ru_stime) / 60, used.ru_maxrss * 1024 / 1e9)


def line(name: str, cost: Cost, step: dict[str, Any]) -> str:
    """One recipe as a line of a table."""
    used, time = sum(step["memory"].values()), step["estimate"]
    peak = time["model_flops"] / time["peak_flops"]
    cells = (
        name,
        " ".join(PUBLISHED[name]),
        f"{used / 2**30:.1f} of {step['capacity'] / 2**30:.1f} GiB, {(step['capacity'] - used) / 2**30:.1f} left",
        f"{time['overlapped']:.2f} to {time['serial']:.2f} s",
        f"{peak / time['serial']:.1%} to {peak / time['overlapped']:.1%}",
        f"{cost.cpu_minutes:.1f} CPU min, {cost.gigabytes:.1f} GB",
    )
    return "| " + " | ".join(cells) + " |"


def main(names: list[str]) -> int:
    """Compile the named recipes, or all, and print a line for each."""
    if strangers := [name for name in names if name not in PUBLISHED]:
        raise SystemExit(f"recipe {strangers[0]!r} is not one of {', '.join(PUBLISHED)}")
    failed = False
    print("| recipe | devices | memory of one | step, an estimate | utilization | compiling |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names or PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            cost = compile_recipe(name, Path(folder))
            plan = Path(folder) / "plan.json"
            if not plan.exists():
                print(f"{name}: status {cost.status}\n{(Path(folder) / 'log.txt').read_text()[-2000:]}")
                failed = True
                continue
            print(line(name, cost, json.loads(plan.read_text())["steps"][0]), flush=True)
        failed |= cost.status != 0 or cost.cpu_minutes > CPU_MINUTES or cost.gigabytes > GIGABYTES
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
