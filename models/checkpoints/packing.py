"""Parameters packed one by one while a model is loaded, so that they are never all there unpacked."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ...compress import Coverage, CoverageReport, Rule
from ..decoder import DecoderLM
from ..quantization import plan_quantization


class Packing:
    """Packs each parameter that the rules ask for; see `filling.Finish`."""

    def __init__(self, abstract: DecoderLM, rules: Sequence[Rule], leave: Sequence[str], dtype: np.dtype):
        """
        Args:
            abstract: the model, with shapes in place of arrays.
            rules: as of `quantize_model`.
            leave: likewise.
            dtype: of the parameters when they are filled.

        Raises:
            ValueError: the rules cannot be carried out; nothing was read.
        """
        state = nnx.state(abstract, nnx.Param)
        typed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), state)
        model = nnx.clone(abstract)
        nnx.update(model, typed)
        self._plan = plan_quantization(model, rules, leave=leave)
        self._entries: dict[tuple, Coverage] = {}

    def __call__(self, path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        variable, self._entries[path] = self._plan[path].carry_out(variable)
        jax.block_until_ready(variable.get_value())
        return variable

    @property
    def report(self) -> CoverageReport:
        """Of all parameters, in the model's order."""
        return CoverageReport(entries=tuple(self._entries[path] for path in self._plan))
