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
from .bench_layer_problem import shapes as layer_shapes
from .bench_packed import bench_packed
from .bench_step import bench_step
from .bench_tune import check_gpu, tune_kernel

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
    """Of the kind models, this one alone. For moe_layer a layer of this one, at full size, on CPU divided by 8; None
    given: a layer for a CPU, on an accelerator OLMoE, Mixtral-8x7B and DeepSeek-V3."""
    output: Path | None = None
    """Write a JSON line for each contender to this new file: of each case and pass of a kernel, or of each layer."""
    tune: bool = False
    """On a GPU, time tiles of its kernels for these cases, and write the fastest to the table of this kind of GPU; with
    --output to that file, new or a table."""
    compile_only: bool = False
    """Time nothing: compile grouped matmuls of the models, at full size, for --chip, which need not be here."""
    chip: str | None = None
    """As v5e, v5p, v6e, tpu7x, h100 or h200."""

    def __post_init__(self):
        named = {
            "cases": self.cases,
            "model": self.model,
            "tune": self.tune,
            "compile_only": self.compile_only,
            "chip": self.chip,
        }
        for name, value in named.items():
            allowed = ("grouped_matmul", "moe_layer") if name == "model" else ("grouped_matmul",)
            if value and self.benchmark not in allowed:
                raise ValueError(
                    f"{name} is {value}; it is for {' and '.join(allowed)}, and benchmark is {self.benchmark}"
                )
        if self.benchmark in ("moe_layer", "packed_decoding", "training_step", "generation"):
            if self.quick:
                raise ValueError(f"quick is True; {self.benchmark} has no shape to leave out: give --rounds")
            if self.output is not None and self.benchmark != "moe_layer":
                raise ValueError(f"output is {self.output}; {self.benchmark} writes none")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1")
        if self.model is not None and self.cases and "models" not in self.cases:
            raise ValueError(f"model is {self.model}; it is of the kind models, and cases are {', '.join(self.cases)}")
        if self.compile_only != (self.chip is not None):
            raise ValueError(f"compile_only is {self.compile_only} and chip {self.chip}; each needs the other")
        if self.compile_only and (set(self.cases) - {"models"} or self.output is not None):
            raise ValueError("compile_only is True; it compiles the cases models alone, and writes no output")
        if self.compile_only and self.tune:
            raise ValueError("compile_only and tune are True; choose one: tuning needs the GPU")

    def run(self, console: Console) -> int:
        if self.benchmark == "training_step":
            return bench_step(self.rounds, console)
        if self.benchmark == "packed_decoding":
            return bench_packed(self.rounds, console)
        if self.benchmark == "generation":
            return bench_generation(self.rounds, console)
        if self.chip is not None:
            return compile_kernel(self.chip, self.model or "OLMoE", self.quick, console)
        if self.output is not None and not self.output.parent.is_dir():
            raise ValueError(f"output {self.output}: its folder does not exist")
        if self.output is not None and self.output.exists() and not self.tune:
            raise ValueError(f"output {self.output}: it exists; give a new file")
        if self.benchmark == "moe_layer":
            return bench_layer(layer_shapes(self.model), self.rounds, self.output, console)
        if self.benchmark == "token_permute":
            moves, notes = token_permute.cases(self.quick)
            _print(notes, console)
            return bench_kernel(token_permute, moves, self.rounds, self.output, console)
        if self.tune:
            check_gpu()
        kinds = self.cases or (("models",) if self.model else ())
        cases, notes = grouped_matmul.cases(self.quick, kinds, self.model)
        _print(notes, console)
        if self.tune:
            return tune_kernel(cases, self.rounds, self.output, console)
        return bench_kernel(grouped_matmul, cases, self.rounds, self.output, console)


def _print(notes: list[str], console: Console) -> None:
    for note in notes:
        console.print(note, highlight=False)
