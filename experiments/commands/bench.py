"""`dynamoe bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ...kernels.grouped_matmul import bench as grouped_matmul
from ...kernels.grouped_matmul.cases import Kind
from ...kernels.token_permute import bench as token_permute
from .bench_compile import compile_kernel
from .bench_generation import bench_generation
from .bench_kernel import bench_kernel
from .bench_layer import bench_layer
from .bench_packed import bench_packed
from .bench_step import bench_step

Benchmark = Literal["grouped_matmul", "token_permute", "moe_layer", "packed_decoding", "training_step", "generation"]
Model = Literal["Mixtral-8x7B", "OLMoE", "Qwen3-30B-A3B", "DeepSeek-V3"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Check results, then time them: a kernel's implementations against their peers, a whole layer against its products
    and another library's, decoding with packed weights, the demo's training steps, or generation against another
    library's.

    Times are ratios from one process, interleaved. A wrong result ends with status 1, before anything is timed.
    """

    benchmark: Annotated[Benchmark, tyro.conf.Positional] = "grouped_matmul"
    """What is measured."""
    quick: bool = False
    """Fewer shapes of a kernel."""
    rounds: int = 5
    """How often each contender is timed; the median counts."""
    cases: tuple[Kind, ...] = ()
    """Kinds of grouped matmuls: experts, layer and decode are sized for a CPU, models are those of published ones. None
    given: all, or with --model models."""
    model: Model | None = None
    """Of the kind models, this one alone."""
    output: Path | None = None
    """Write a JSON line for each case, pass and contender of a kernel to this new file."""
    compile_only: bool = False
    """Time nothing: compile grouped matmuls of the models, at full size, for --chip, which need not be here."""
    chip: str | None = None
    """As v5e, v5p, v6e, tpu7x, h100 or h200."""

    def __post_init__(self):
        named = {"cases": self.cases, "model": self.model, "compile_only": self.compile_only, "chip": self.chip}
        given = {name: value for name, value in named.items() if value}
        if given and self.benchmark != "grouped_matmul":
            name, value = next(iter(given.items()))
            raise ValueError(f"{name} is {value}; it is for grouped_matmul, and benchmark is {self.benchmark}")
        if self.benchmark in ("moe_layer", "packed_decoding", "training_step", "generation"):
            if self.quick:
                raise ValueError(f"quick is True; {self.benchmark} has one shape: give --rounds")
            if self.output is not None:
                raise ValueError(f"output is {self.output}; {self.benchmark} writes none")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1")
        if self.model is not None and self.cases and "models" not in self.cases:
            raise ValueError(f"model is {self.model}; it is of the kind models, and cases are {', '.join(self.cases)}")
        if self.compile_only != (self.chip is not None):
            raise ValueError(f"compile_only is {self.compile_only} and chip {self.chip}; each needs the other")
        if self.compile_only and (set(self.cases) - {"models"} or self.output is not None):
            raise ValueError("compile_only is True; it compiles the cases models alone, and writes no output")

    def run(self, console: Console) -> int:
        if self.benchmark == "training_step":
            return bench_step(self.rounds, console)
        if self.benchmark == "packed_decoding":
            return bench_packed(self.rounds, console)
        if self.benchmark == "generation":
            return bench_generation(self.rounds, console)
        if self.benchmark == "moe_layer":
            return bench_layer(self.rounds, console)
        if self.chip is not None:
            return compile_kernel(self.chip, self.model or "OLMoE", self.quick, console)
        if self.output is not None and (self.output.exists() or not self.output.parent.is_dir()):
            why = "it exists; give a new file" if self.output.exists() else "its folder does not exist"
            raise ValueError(f"output {self.output}: {why}")
        if self.benchmark == "token_permute":
            kernel, (cases, notes) = token_permute, token_permute.cases(self.quick)
        else:
            kinds = self.cases or (("models",) if self.model else ())
            kernel, (cases, notes) = grouped_matmul, grouped_matmul.cases(self.quick, kinds, self.model)
        for note in notes:
            console.print(note, highlight=False)
        return bench_kernel(kernel, cases, self.rounds, self.output, console)
