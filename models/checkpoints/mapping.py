"""How the tensors of a file and the arrays of a model belong together, in both directions.

Nothing but views lies between the two: a `View` of a tensor, in reading it, is what goes into our array; and in
writing, filling the view fills the tensor. So what is loaded can be saved, and no transform needs an inverse.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class View:
    """A tensor, reshaped, some of it taken, its axes in another order. Works on NumPy's arrays and on JAX's."""

    split: tuple[int, ...]
    """The shape that it is seen in first."""
    order: tuple[int, ...]
    """Its axes, in our order."""
    take: tuple[int, int, int, int] | None = None
    """Axis, start, stop, step of what is taken, before the axes are ordered; None: all."""

    def __call__(self, tensor: Any) -> Any:
        tensor = tensor.reshape(self.split)
        if self.take is not None:
            axis, start, stop, step = self.take
            tensor = tensor[(slice(None),) * axis + (slice(start, stop, step),)]
        return tensor.transpose(self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """What comes out."""
        sizes = list(self.split)
        if self.take is not None:
            axis, start, stop, step = self.take
            sizes[axis] = len(range(start, min(stop, sizes[axis]), step))
        return tuple(sizes[axis] for axis in self.order)


class Piece(NamedTuple):
    """A part of a tensor, and where it goes."""

    path: str
    """Of our array in an unstacked model, "layers.3.attention.query"."""
    view: View
    index: tuple[int, ...] = ()
    """Place on the leading axes of our array: which expert."""
    start: int = 0
    """Place on its last axis."""


class FileTensor(NamedTuple):
    """A tensor of the published model, and the arrays that it is a part of."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    same_as: str | None = None
    """The name of a tensor that this one repeats, where it is there at all: a head that is the embedding."""


def same(name: str, path: str, shape: tuple[int, ...], index: tuple[int, ...] = ()) -> FileTensor:
    """A tensor that is as ours is."""
    return FileTensor(name, shape, (Piece(path, View(shape, tuple(range(len(shape)))), index),))


def linear(
    name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], index: tuple[int, ...] = ()
) -> FileTensor:
    """A linear map: [outputs, inputs] in the file, each flattened; [*inputs, *outputs] in our array."""
    return FileTensor(name, flat(outputs, inputs), (Piece(path, turned(inputs, outputs), index),))


def flat(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """Each group of axes as one; a group of none is no axis: the input of a bias."""
    return tuple(math.prod(group) for group in groups if group)


def turned(inputs: tuple[int, ...], outputs: tuple[int, ...], take: tuple[int, int, int, int] | None = None) -> View:
    """[*inputs, *outputs] of a tensor [outputs, inputs]; `take` counts axes of [*outputs, *inputs]."""
    into, out = len(inputs), len(outputs)
    return View((*outputs, *inputs), (*range(out, out + into), *range(out)), take)


def interleaved(
    name: str, path: str, inputs: tuple[int, ...], heads: int, width: int, rotary: tuple[int, int] | None = None
) -> FileTensor:
    """A map to heads whose rotary pairs are neighbours (2i, 2i + 1) in the file, and i and i + width / 2 in ours.

    With `inputs` () it is a bias.
    """
    start, stop = (0, width) if rotary is None else rotary
    half = (stop - start) // 2
    pieces = tuple(
        Piece(path, turned(inputs, (heads, width), (1, start + odd, stop, 2)), start=odd * half) for odd in (0, 1)
    )
    return FileTensor(name, flat((heads, width), inputs), pieces)


def covered(tensors: list[FileTensor]) -> dict[str, int]:
    """How many numbers go into each of our arrays."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        for piece in tensor.pieces if tensor.same_as is None else ():
            sizes[piece.path] = sizes.get(piece.path, 0) + math.prod(piece.view.shape)
    return sizes


def whole(tensor: FileTensor, parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The tensor of the file, put together of its pieces' parts of our arrays."""
    array = np.empty(tensor.shape, dtype)
    for piece, part in zip(tensor.pieces, parts, strict=True):
        piece.view(array)[...] = part.astype(dtype)
    return array
