"""A built model with packed weights in place of chosen parameters, for inference.

    rules = [Rule(pattern="*.experts.*", technique=RoundToNearest(format=INT4, group_size=128))]
    model, report = quantize_model(model, rules)

A parameter can be packed if its module multiplies with it through a product that unpacks in its tiles. Experts do
(`moe.expert_matmul`: matrices with the axes "embed" and "mlp"); any other module says so itself, by a class attribute
`linear_kernels`: the names of its kernels that go through `models.linear.linear`, and over how many axes each sums. The
embedding can be packed too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ..compress import Coverage, CoverageReport, Rule, Technique, choose_techniques, compress_one
from ..kernels.quantized import Quantized
from ..moe import QuantizedWeight
from .decoder import DecoderLM
from .packed import QuantizedKernel, QuantizedTable


class Form(NamedTuple):
    """How a parameter is a matrix [*lead, D, F], D summed over; and the variable that holds it packed."""

    shape: tuple[int, ...]
    """Of the matrix."""
    to_matrix: Callable[[Array], Array]
    to_variable: Callable[[Quantized], QuantizedWeight]


def quantize_model(
    model: DecoderLM, rules: Sequence[Rule], *, leave: Sequence[str] = ()
) -> tuple[DecoderLM, CoverageReport]:
    """A copy of a model with weights packed by rules; the given one stays as it is.

    Args:
        model: stacked or unstacked. Paths are those of `parameter_name`: "layers.3.ffn.experts.gate", "head_kernel";
            stacked, a run of layers is one path.
        rules: techniques whose results are `Quantized`, as of `RoundToNearest`; see `compress.compress`.
        leave: patterns of parameters that stay as they are.

    Returns:
        The model and a report of every parameter. Packed weights are no parameters: they have no gradient.

    Raises:
        ValueError: a pattern decides for nothing, a parameter that is asked for cannot be packed (all are listed), or
            the model does not run with its packed weights.
    """
    packed, plan = nnx.clone(model), plan_quantization(model, rules, leave=leave)
    entries = []
    for path, variable in nnx.to_flat_state(nnx.state(packed, nnx.Param)):
        variable, entry = plan[path].carry_out(variable)
        set_variable(packed, path, variable)
        entries.append(entry)
    check_that_it_runs(packed)
    return packed, CoverageReport(entries=tuple(entries))


class PlannedParameter(NamedTuple):
    """What is to become of one parameter."""

    name: str
    form: Form | None
    technique: Technique | None

    def carry_out(self, variable: nnx.Variable) -> tuple[nnx.Variable, Coverage]:
        """The variable that takes its place, and its line of the report."""
        array = variable.get_value() if self.form is None else self.form.to_matrix(variable.get_value())
        made, entry = compress_one(self.name, array, self.technique)
        if self.technique is None or self.form is None:
            return variable, entry
        if not isinstance(made, Quantized):
            raise ValueError(
                f"{self.name}: a technique made a {type(made).__name__} of it; a model takes Quantized alone"
            )
        return self.form.to_variable(made), entry


def plan_quantization(
    model: DecoderLM, rules: Sequence[Rule], *, leave: Sequence[str] = ()
) -> dict[tuple, PlannedParameter]:
    """What `quantize_model` does to every parameter, by its path; the model may have shapes in place of arrays.

    Raises:
        ValueError: as `quantize_model`.
    """
    forms, shapes, unfit = {}, {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, form, value = parameter_name(model, path), form_of(model, path, variable), variable.get_value()
        forms[name] = path, form
        shapes[name] = jax.ShapeDtypeStruct(value.shape if form is None else form.shape, value.dtype)
        if form is None:
            unfit[name] = "its module does not multiply with packed weights"
    chosen = choose_techniques(shapes, rules, leave=leave, unfit=unfit)
    return {path: PlannedParameter(name, form, chosen[name]) for name, (path, form) in forms.items()}


def parameter_names(model: DecoderLM) -> list[str]:
    """All parameters, by `parameter_name`."""
    return [parameter_name(model, path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def packable(model: DecoderLM) -> dict[str, tuple[int, ...]]:
    """The parameters that can be packed, by `parameter_name`, and the shapes [*lead, D, F] of their matrices."""
    forms = {
        parameter_name(model, path): form_of(model, path, variable)
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    return {name: form.shape for name, form in forms.items() if form is not None}


def parameter_name(model: DecoderLM, path: tuple) -> str:
    """A variable's path with dots. Unstacked, layers are numbered from the first: "layers.3.attention.query"."""
    path = tuple(path)
    if path[0] == "segments" and all(segment.depth == 1 for segment in model.segments):
        path = ("layers", path[1], *path[5:])  # each segment is one unit of one layer
    return ".".join(map(str, path))


def form_of(model: DecoderLM, path: tuple, variable: nnx.Variable) -> Form | None:
    """How a parameter is packed; None: it cannot be. Its value may be a shape."""
    *modules, name = path
    axes: tuple = tuple(variable.get_metadata().get("axes") or ())
    shape: tuple[int, ...] = tuple(variable.get_value().shape)
    lead = axes[:1] == ("layers",)
    own, own_shape = axes[lead:], shape[lead:]
    inputs = getattr(type(_owner(model, modules)), "linear_kernels", {}).get(name)
    if inputs is not None:
        sides = (*shape[:lead], math.prod(own_shape[:inputs]), math.prod(own_shape[inputs:]))
        kernel_axes = (*axes[:lead], own[0], own[inputs])
        return Form(
            sides,
            lambda array: array.reshape(sides),
            lambda packed: QuantizedKernel(packed, axes=kernel_axes, into=own_shape[:inputs], out=own_shape[inputs:]),
        )
    if own == ("vocab", "embed"):
        return Form(shape[::-1], lambda array: array.T, lambda packed: QuantizedTable(packed, axes=own[::-1]))
    if len(own) == 3 and {"embed", "mlp"} == set(own[1:]):
        return Form(shape, lambda array: array, lambda packed: QuantizedWeight(packed, axes=axes))
    return None


def set_variable(model: DecoderLM, path: tuple, variable: nnx.Variable) -> None:
    """Put a variable into a model in place of the one at a path."""
    *modules, name = path
    setattr(_owner(model, modules), name, variable)


def _owner(model: nnx.Module, modules: Sequence[Any]) -> Any:
    owner: Any = model
    for part in modules:
        owner = owner[part] if isinstance(part, int) else getattr(owner, part)
    return owner


def check_that_it_runs(model: DecoderLM) -> None:
    """Trace a forward pass, without computing it: a module that cannot use a packed weight says so now."""
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    try:
        jax.eval_shape(lambda state, tokens: nnx.merge(graph, state)(tokens).logits, state, tokens)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the model does not run with its packed weights: {error}") from error
