"""Models back into safetensors that transformers loads, tensor by tensor."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..decoder import DecoderLM
from .arrays import Place, array_of, places_of
from .described import check_described
from .fields import Fields
from .folder import CONFIG, INDEX, SINGLE, Shard, write_json
from .mapping import FileTensor, Piece, whole
from .packed_folder import is_packed_further, save_packed_folder
from .pretrained import Pretrained
from .registry import family_of
from .tensor_files import DTYPES, Outgoing, write_file

LARGEST_SHARD = 5_000_000_000
"""Bytes of one file, where the model does not come with a division."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_pretrained(pretrained: Pretrained, path: str | Path) -> None:
    """Write a folder with config.json, safetensors and the tokenizer's files.

    Names, dtypes and the division into files are those that were loaded, so a model that was not changed in between
    comes out byte by byte, where it was loaded in a dtype that holds the files' numbers. With several processes all
    must call it; the first one writes.

    A model whose weights were packed is written in a form of our own, which `from_pretrained` reads and transformers
    does not.

    Args:
        pretrained: from `from_pretrained`, perhaps with another model in it; or from `as_pretrained`.
        path: a new or empty folder.

    Raises:
        ValueError: the folder holds something, or the model is not the one that the configuration describes.
        OSError: it cannot be written.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"path is {folder}, which is there and not an empty folder; it must be new or empty")
    if is_packed_further(pretrained):
        save_packed_folder(pretrained, folder)
        return
    tensors = {tensor.name: tensor for tensor in _tensors(pretrained)}
    shards = pretrained.shards or _divided(tensors, pretrained.dtypes)
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    fetch = _Fetch(pretrained.model)
    for shard in shards:
        outgoing = [
            Outgoing(name, pretrained.dtypes[name], tensors[name].shape, functools.partial(fetch, tensors[name], dtype))
            for name in shard.tensors
            if name not in pretrained.left_out
            for dtype in (DTYPES[pretrained.dtypes[name]],)
        ]
        if writes:
            write_file(folder / shard.name, outgoing, shard.metadata)
        else:
            for tensor in outgoing:
                tensor.data()
    if not writes:
        return
    index = pretrained.index or (_index(tensors, shards, pretrained.dtypes) if len(shards) > 1 else None)
    if index is not None:
        kept = {name: file for name, file in index["weight_map"].items() if name not in pretrained.left_out}
        write_json(folder / INDEX, {**index, "weight_map": kept})
    for file in pretrained.files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / CONFIG, pretrained.config)


def as_pretrained(model: DecoderLM, config: Mapping[str, Any]) -> Pretrained:
    """A model of one's own as one of a family, to be saved for transformers.

    Args:
        model: its configuration must be what `config` describes, up to dtype and what only training sees.
        config: the config.json to write.

    Raises:
        ValueError: the family is unknown, or the two do not describe the same model.
    """
    fields = Fields(config)
    family = family_of(fields)
    arrays = check_described(model, family, fields)
    tensors = [tensor for tensor in family.tensors(fields, family.decoder(fields)) if tensor.same_as is None]
    dtypes = {tensor.name: _NAMES[np.dtype(arrays[tensor.pieces[0].path].dtype)] for tensor in tensors}
    return Pretrained(model, dict(config), family, dtypes)


def _tensors(pretrained: Pretrained) -> list[FileTensor]:
    fields = Fields(pretrained.config)
    check_described(pretrained.model, pretrained.family, fields)
    tensors = list(pretrained.family.tensors(fields, pretrained.family.decoder(fields)))
    by_name = {tensor.name: tensor for tensor in tensors}
    return [
        tensor._replace(pieces=by_name[tensor.same_as].pieces) if tensor.same_as else tensor
        for tensor in tensors
        if tensor.name in pretrained.dtypes
    ]


class _Fetch:
    """Puts a file's tensor together out of a model's arrays, which may be split over devices."""

    def __init__(self, model: DecoderLM):
        self.places = places_of(model)
        self.variables = dict(nnx.to_flat_state(nnx.state(model)))

    def __call__(self, tensor: FileTensor, dtype: np.dtype) -> np.ndarray:
        return whole(tensor, [self.part(piece) for piece in tensor.pieces], dtype)

    def part(self, piece: Piece) -> np.ndarray:
        place: Place = self.places[piece.path]
        array = array_of(self.variables[place.variable].get_value(), place.part)
        index = np.array((*place.repeat, *piece.index), np.int32)
        sharding = array.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return np.asarray(_taken(len(index), piece.start, piece.view.shape[-1], sharding)(array, index))


@functools.lru_cache(maxsize=64)
def _taken(leading: int, start: int, length: int, sharding: jax.sharding.Sharding) -> Any:
    """A compiled function that takes one layer's or expert's part, whole on every device."""

    def take(array: jax.Array, index: jax.Array) -> jax.Array:
        for axis in range(leading):
            array = jax.lax.dynamic_index_in_dim(array, index[axis], 0, keepdims=False)
        return jax.lax.slice_in_dim(array, start, start + length, axis=-1)

    return jax.jit(take, out_shardings=sharding)


def _bytes(tensor: FileTensor, dtypes: dict[str, str]) -> int:
    return int(np.prod(tensor.shape)) * DTYPES[dtypes[tensor.name]].itemsize


def _divided(tensors: dict[str, FileTensor], dtypes: dict[str, str]) -> tuple[Shard, ...]:
    """Files of at most `LARGEST_SHARD`, or of one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += _bytes(tensor, dtypes)
        if size > LARGEST_SHARD and groups[-1]:
            groups.append([])
            size = _bytes(tensor, dtypes)
        groups[-1].append(name)
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return tuple(Shard(name, tuple(group), {"format": "pt"}) for name, group in zip(names, groups, strict=True))


def _index(tensors: dict[str, FileTensor], shards: tuple[Shard, ...], dtypes: dict[str, str]) -> dict[str, Any]:
    total = sum(_bytes(tensor, dtypes) for tensor in tensors.values())
    files = {name: shard.name for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": files}
