"""Round-to-nearest quantization: every number of a group becomes the nearest that its format has, and no data is seen.

The baseline of GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, "RTN") and AWQ (Lin et al. 2023,
https://arxiv.org/abs/2306.00978).
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from ..kernels.quantized import INT4, Format, Quantized, dequantize, quantize
from .technique import Technique


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Technique):
    """Numbers of few bits, with one scale for each group of neighbours along D; see `kernels.quantized.quantize`."""

    format: Format = INT4
    """One of `kernels.quantized.FORMATS`."""
    group_size: int | None = None
    """Neighbours along D that share a scale; None: the format's block, or all of D."""
    zero_points: bool = False
    """Also shift each group; integers alone."""

    def __post_init__(self):
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"RoundToNearest.group_size is {self.group_size}; it must be at least 1, or None")
        if self.zero_points and not self.format.is_integer:
            raise ValueError(f"RoundToNearest.zero_points is True; the codes of {self.format.name} are not integers")
        if self.format.power_of_two and self.group_size not in (None, self.format.block):
            raise ValueError(
                f"RoundToNearest.group_size is {self.group_size}; {self.format.name} has groups of "
                f"{self.format.block} alone"
            )

    @property
    def name(self) -> str:
        size = self.group_size or self.format.block
        groups = f", groups of {size}" if size else ", whole columns"
        return self.format.name + groups + (", zero points" if self.zero_points else "")

    def compress(self, weight: Float[Array, "*lead D F"], statistics: Any = None) -> Quantized:
        return quantize(weight, self.format, group_size=self.group_size, zero_points=self.zero_points)

    def expand(self, compressed: Quantized) -> Float[Array, "*lead D F"]:
        return dequantize(compressed)
