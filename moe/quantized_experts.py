"""Experts with packed weights, for inference: a fraction of the bytes, unpacked inside the grouped matmul.

layer.experts = quantize_experts(layer.experts, INT4, group_size=64)       # INT4: dynamoe.kernels.quantized
"""

from typing import Any, TypeVar

from flax import nnx

from ..kernels.quantized import Format, quantize

Built = TypeVar("Built", bound=nnx.Module)


class QuantizedWeight(nnx.Variable):
    """A packed weight, a `Quantized`, with the logical axes of the array that it stands for. It is no parameter: the
    optimizer does not see it, and gradients pass it by on their way to the rows."""


def quantize_experts(
    experts: Built, format: Format, *, group_size: int | None = None, zero_points: bool = False
) -> Built:
    """A copy of built experts with their matrices packed; the given ones stay as they are.

    Packed are the parameters that carry the logical axes "embed" and "mlp", one group of neighbours along the axis that
    products sum over after another; with leading axes "layers" too. Gates and biases stay. It is for experts whose
    products all go through `expert_matmul`, as those of `SwiGLU`, `GELU` and `GatedShared` do.

    Args:
        experts: built experts, such as `layer.experts` or `layer.shared`.
        format: one of `kernels.quantized.FORMATS`.
        group_size: neighbours that share a scale, see `kernels.quantized.quantize`.
        zero_points: also shift each group; integers alone.

    Raises:
        ValueError: there is no such parameter, or one does not divide into groups; it is named.
    """
    packed = nnx.clone(experts)
    weights = {
        path: variable
        for path, variable in nnx.to_flat_state(nnx.state(packed, nnx.Param))
        if {"embed", "mlp"} <= set(variable.get_metadata().get("axes") or ())
    }
    if not weights:
        raise ValueError(
            f"experts is a {type(experts).__name__} without a parameter that has the axes 'embed' and 'mlp'; there is "
            "nothing to pack"
        )
    for path, variable in weights.items():
        try:
            weight = quantize(variable.get_value(), format, group_size=group_size, zero_points=zero_points)
        except ValueError as error:
            raise ValueError(f"experts.{'.'.join(map(str, path))}: {error}") from error
        owner: Any = packed
        *modules, attribute = map(str, path)
        for name in modules:
            owner = getattr(owner, name)
        setattr(owner, attribute, QuantizedWeight(weight, axes=variable.get_metadata()["axes"]))
    return packed
