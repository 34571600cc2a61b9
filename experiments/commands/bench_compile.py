"""`dynamoe bench grouped_matmul --compile-only`: what a chip's compiler says of the shapes of a model, without the chip.

Nothing is measured or estimated. Letters: M rows, D inner width, F output width, E groups.
"""

import jax
import jax.numpy as jnp
from rich.console import Console

from ...kernels.aot import compile_for
from ...kernels.chips import CHIPS
from ...kernels.grouped_matmul.bench import FOR_CPU, compiled_pass
from ...kernels.grouped_matmul.api import IMPLEMENTATIONS
from ...kernels.grouped_matmul.cases import PASSES
from ...kernels.grouped_matmul.operands import numbers_on, quantized_as
from ...kernels.grouped_matmul.shapes import MODELS, PHASES, model_shape
from ...kernels.quantized import quantize_rows


def compile_kernel(chip: str, model: str, quick: bool, console: Console) -> int:
    """Print a report for each implementation, pass and kind of numbers.

    Args:
        chip: as `compile_for` takes it.
        model: whose up projection is compiled, at full size: in training every pass, in decoding the forward one.
        quick: only in training, over plain numbers.
        console: to print to.

    Returns:
        0; or 1 where the compiler refuses something, which is printed.
    """
    platform = "tpu" if chip.partition(":")[0] in CHIPS and CHIPS[chip.partition(":")[0]].gpu is None else "gpu"
    others = {"mosaic_tpu"} if platform == "gpu" else set()
    names = [name for name in IMPLEMENTATIONS if name not in {*FOR_CPU, "reference", *others}]
    refused = False
    for phase in ("training",) if quick else ("training", "decode"):
        shape = model_shape(model, phase, "up", 1)
        for numbers in numbers_on(platform):
            for which in PASSES if phase == "training" else PASSES[:1]:
                if phase == "training" and numbers.weights is not None:
                    continue
                for name in names:
                    title = f"{model} up {phase} {'x'.join(map(str, shape))} {MODELS[model].experts}, {which}, {name}"
                    console.print(f"\n{title} {numbers.name}", highlight=False)
                    x, dy = (jax.ShapeDtypeStruct((shape.rows, n), numbers.dtype) for n in (shape.inner, shape.width))
                    w = jax.ShapeDtypeStruct((MODELS[model].experts, shape.inner, shape.width), numbers.dtype)
                    sizes = jax.ShapeDtypeStruct((MODELS[model].experts,), jnp.int32)
                    if numbers.weights is not None:
                        w = jax.eval_shape(lambda w, numbers=numbers: quantized_as(numbers, w), w)
                    if numbers.integer_rows:
                        x = jax.eval_shape(quantize_rows, x)
                    try:
                        report = compile_for(chip, compiled_pass(name, which), x, w, sizes, dy)
                    except (NotImplementedError, jax.errors.JaxRuntimeError) as refusal:
                        refused = True
                        console.print(f"  refused: {str(refusal).splitlines()[0]}", highlight=False)
                        continue
                    for key, value in report.table():
                        console.print(f"  {key}: {value}", highlight=False)
    return int(refused)
