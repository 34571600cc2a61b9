"""`dynamoe bench grouped_matmul --tune`: the fastest tiles on the GPU that is here, into the table of its kind."""

from collections.abc import Iterable
from pathlib import Path

import jax
from rich.console import Console

from ...kernels.grouped_matmul.cases import Case
from ...kernels.grouped_matmul.tuning import tune, write_table


def check_gpu() -> None:
    """Refuse another platform.

    Raises:
        ValueError: there is no GPU.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(f"tune is True; tables are of GPUs, and the platform is {jax.default_backend()}")


def tune_kernel(cases: Iterable[Case], rounds: int, output: Path | None, console: Console) -> int:
    """Tune pass by pass, and write each as soon as it is found: what ends early keeps what it has.

    Args:
        cases: what is tuned for.
        rounds: how often each candidate is timed.
        output: the table to write to or add to; None: the package's own of this kind of GPU.
        console: to print to.

    Raises:
        ArithmeticError: a candidate's result is wrong.
    """
    file = None
    for found in tune(cases, rounds):
        for failure in found.failed:
            console.print(f"  left out: {failure}", highlight=False)
        tiles = ", ".join(f"{name} {value}" for name, value in found.tiles._asdict().items())
        gain = "the rule's do not run" if found.gain is None else f"{found.gain:.2f} times as fast as the rule's"
        console.print(f"{found.name}: {tiles}; {gain}, of {found.tried}", highlight=False)
        file = write_table([found], output)
    console.print("nothing to tune" if file is None else f"written to {file}", highlight=False)
    return 0
