"""A packed array: codes, scales and zero points, as one pytree.

Its leaves have the rank of the array that it stands for, and each axis of a leaf is that axis of the array, or a part
of it: one PartitionSpec serves all leaves, and a leading axis may be scanned or mapped over. Letters: E groups of a
grouped matmul, D the axis that products sum over and codes are packed along, F output width.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .formats import Format

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """An array [..., D, F] of a few bits per element; `quantize` makes it, `dequantize` undoes it.

    The leaves are not checked: inside transformations they are also shapes, shardings or axis numbers.
    """

    codes: Any
    """[..., D * bits / 8, F], in the format's dtype: see `formats`."""
    scales: Any
    """[..., D / group_size, F], float32; uint8 where the format's scales are powers of two."""
    zero_points: Any
    """Codes, like scales, int8: value = (code - zero point) * scale. None: they are all zero."""
    format: Format
    group_size: int
    """So many neighbours along D share a scale."""
    dtype: np.dtype
    """Of the array that it stands for: float32, bfloat16 or float16."""

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, width = self.codes.shape
        return *lead, rows * self.format.per_byte, width

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_element(self) -> float:
        """With scales and zero points."""
        return 8 * self.nbytes / self.size

    def astype(self, dtype: jax.typing.DTypeLike) -> "Quantized":
        """The same codes, standing for an array of another dtype."""
        return replace(self, dtype=checked_dtype(dtype))

    def __getitem__(self, index: Any) -> "Quantized":
        """Entries of the leading axis, or with `...` all of it, as of a Flax variable's array.

        Raises:
            ValueError: there is no leading axis besides D and F, or the index is for several axes.
        """
        if index is Ellipsis:
            return self
        if self.ndim < 3 or index is None or isinstance(index, tuple):
            raise ValueError(f"index is {index!r} of an array {list(self.shape)}; allowed is one of an axis before D")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def tree_flatten_with_keys(self):
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("codes", "scales", "zero_points")]
        return keyed, (self.format, self.group_size, self.dtype)

    @classmethod
    def tree_unflatten(cls, static, leaves) -> "Quantized":
        codes, scales, zero_points = leaves
        format, group_size, dtype = static
        return cls(
            codes=codes, scales=scales, zero_points=zero_points, format=format, group_size=group_size, dtype=dtype
        )


def checked_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    if jnp.dtype(dtype) not in DTYPES:
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; allowed are {', '.join(map(str, DTYPES))}")
    return jnp.dtype(dtype)


def check_shards(array: Quantized, shards: int, name: str) -> None:
    """Refuse to split axis D of an array into so many parts where a group would be cut.

    Raises:
        ValueError: the number of groups is not a multiple of `shards`; `name` says which array that is.
    """
    inner = array.shape[-2]
    groups = inner // array.group_size
    if groups % shards:
        raise ValueError(
            f"{name} has D = {inner} and group_size {array.group_size}, {groups} groups with a scale each; to split D "
            f"over {shards} shards their number must be a multiple of that"
        )
