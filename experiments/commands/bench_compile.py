"""`dynamoe bench grouped_matmul --compile-only`: what a chip's compiler says of a model's shapes.

The chip need not be here. Nothing is measured or estimated. Letters: M rows, D inner width, F output width, E groups.
"""

import jax
import jax.numpy as jnp
from rich.console import Console

from ...kernels.aot import compile_for, mesh_for
from ...kernels.chips import CHIPS
from ...kernels.grouped_matmul.bench import compiled_pass, implementations
from ...kernels.grouped_matmul.cases import PASSES
from ...kernels.grouped_matmul.operands import numbers_on, quantized_as
from ...kernels.grouped_matmul.shapes import MODELS, model_shape
from ...kernels.quantized import quantize_rows


def compile_kernel(chip: str, model: str, quick: bool, console: Console) -> int:
    """Print a report for each implementation, pass and kind of numbers.

    Args:
        chip: as `compile_for` takes it.
        model: whose up projection is compiled, at full size: in training every pass, in decoding the forward one.
        quick: only in training, over plain numbers.
        console: to print to.

    Returns:
        0; or 1 where the compiler refuses something. That is printed, as is what an implementation does not take.
    """
    kind = CHIPS.get(chip.partition(":")[0])
    platform = "tpu" if kind is None or kind.gpu is None else "gpu"
    mesh_for(chip, {"device": 1})  # says at once that there is no such chip or no compiler for it
    names = [name for name in implementations(platform) if name != "reference"]
    console.print("FLOPs of dx and dw are counted with the passes beside them, which the compiler then leaves out.")
    refused = False
    for phase in ("training",) if quick else ("training", "decode"):
        shape = model_shape(model, phase, "up", 1)
        for numbers in numbers_on(platform):
            if numbers.weights is None and numbers.name != numbers_on(platform)[0].name:
                continue  # at full size one kind of floats is enough
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
                    except NotImplementedError as limit:
                        console.print(f"  left out: {str(limit).splitlines()[0]}", highlight=False)
                        continue
                    except jax.errors.JaxRuntimeError as refusal:
                        refused = True
                        console.print(f"  refused: {str(refusal).splitlines()[0]}", highlight=False)
                        continue
                    for key, value in report.table():
                        console.print(f"  {key}: {value}", highlight=False)
    return int(refused)
