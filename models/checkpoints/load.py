"""Published models into sharded device arrays, tensor by tensor.

    pretrained = from_pretrained("path/to/OLMoE-1B-7B-0924")
    logits = pretrained.model(tokens).logits

Beside the arrays that stay, the host holds one tensor of the file at a time, and its rounded copy.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from ..decoder import Decoder, DecoderLM
from ..sharding import Layout
from .arrays import Place, array_of, places_of, shape_of, wanted_dtype
from .family import Family
from .fields import Fields
from .folder import Source, open_folder
from .llama2_c import is_llama2_c, open_llama2_c
from .mapping import FileTensor, Piece, covered
from .pretrained import Pretrained
from .registry import family_of
from .tensor_files import Entry
from .turning import aligned, contiguous

LISTED = 20
"""Wrong tensors that an error spells out; of the others it gives the number."""
FLOATS = ("F32", "F16", "BF16", "F64")
Leaf = tuple[tuple[Any, ...], str | None]


def from_pretrained(
    path: str | Path, *, layout: Layout | None = None, dtype: Any = jnp.float32, stacked: bool = False
) -> Pretrained:
    """Load a published model: a folder with config.json and safetensors, or a file of llama2.c.

    Args:
        path: the folder or file; or where there is none of that name "organisation/name" on the Hugging Face hub, whose
            files huggingface_hub (an optional package) downloads into the user's cache. A local path needs no network.
        layout: the mesh, over which the arrays are born split; None: the default device.
        dtype: of parameters and of computing with them, float32 or bfloat16. Packed weights stay packed, and what
            routers remember stays in float32.
        stacked: equal layers as one scanned array (training) instead of one each (decoding).

    Raises:
        ValueError: there is no model, its architecture or a value of its configuration is unknown, its files are
            broken, or tensors are missing, too many or of wrong shapes: all of these are named, and nothing is loaded.
        OSError: a file cannot be read.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; allowed are float32 and bfloat16")
    place = _local(path)
    source, family = open_llama2_c(place) if is_llama2_c(place) else (open_folder(place), None)
    fields = Fields(source.config)
    saved_as = family_of(fields)
    family = saved_as if family is None else family
    decoder = _decoder(family, fields, source)
    tensors = checked_tensors(family, fields, decoder, source.entries)
    decoder = dataclasses.replace(decoder, dtype=jnp.dtype(dtype).name)
    model = _filled(abstract_model(family, fields, decoder, stacked), tensors, source, layout, jnp.dtype(dtype))
    dtypes = {entry.name: entry.dtype for entry in source.entries.values()}
    left_out = tuple(name for name in source.entries if family.left_out(name, decoder))
    return Pretrained(model, source.config, saved_as, dtypes, source.shards, source.index, source.files, left_out)


def _local(path: str | Path) -> Path:
    place = Path(path)
    if place.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return place
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"path is {str(path)!r}, which is no local folder; to fetch it from the Hugging Face hub install "
            "huggingface_hub"
        ) from error
    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "*.tiktoken", "chat_template*"]
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))


def _decoder(family: Family, fields: Fields, source: Source) -> Decoder:
    """Our configuration. More layers than tensors would take for ever to refuse one by one."""
    layers = fields.integer("num_hidden_layers")
    if layers > len(source.entries):
        raise ValueError(
            f"{fields.name}: num_hidden_layers is {layers}; the files hold {len(source.entries)} tensors, too few"
        )
    packing = fields.object("quantization_config")
    if packing is not None:
        packing.word("quant_method", family.quantizations)
    try:
        return family.decoder(fields)
    except ValueError as error:
        raise ValueError(f"{fields.name} of a {family.model_type} model: {error}") from error


def checked_tensors(family: Family, fields: Fields, decoder: Decoder, entries: dict[str, Entry]) -> list[FileTensor]:
    """The tensors of a model, all of which are there as they must be; nothing of them is read yet.

    Raises:
        ValueError: tensors are missing, too many, of other shapes or kinds; they are named.
    """
    # Bounded by what the files hold, not by what the configuration claims.
    tensors = list(itertools.islice(family.tensors(fields, decoder), len(entries) + 1000))
    needed = {tensor.name: tensor for tensor in tensors}
    wrong = [f"{name} is missing" for name, tensor in needed.items() if name not in entries and not tensor.same_as]
    for name, entry in entries.items():
        if name not in needed:
            if not family.left_out(name, decoder):
                wrong.append(f"{name} is not part of the model")
        elif entry.shape != needed[name].shape:
            wrong.append(f"{name} has shape {list(entry.shape)}; it must be {list(needed[name].shape)}")
        elif entry.dtype not in (("U8",) if _packed(needed[name]) else FLOATS):
            wrong.append(f"{name} has dtype {entry.dtype}; allowed are {'U8' if _packed(needed[name]) else FLOATS}")
    if wrong:
        more = f"\n  and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        lines = "".join(f"\n  {line}" for line in wrong[:LISTED])
        raise ValueError(
            f"the files do not hold the model that {fields.name} describes; nothing is loaded:{lines}{more}"
        )
    return tensors


def _packed(tensor: FileTensor) -> bool:
    return any(piece.path.endswith((".codes", ".scales")) for piece in tensor.pieces)


def abstract_model(family: Family, fields: Fields, decoder: Decoder, stacked: bool) -> DecoderLM:
    """The model without numbers."""
    return nnx.eval_shape(lambda: family.prepared(decoder.build(jax.random.key(0), stacked=stacked), fields))


def _filled(
    model: DecoderLM, tensors: list[FileTensor], source: Source, layout: Layout | None, dtype: np.dtype
) -> DecoderLM:
    """The abstract model with the numbers of the files."""
    graph, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    places = places_of(model)
    sizes = covered(tensors)
    for path, place in places.items():
        shape = shape_of(array_of(variables[place.variable].get_value(), place.part), place)
        assert sizes.pop(path, None) == math.prod(shape), f"the family's tensors do not fill {path} {shape}"
    assert not sizes, f"the family's tensors fill what the model does not have: {sorted(sizes)}"
    shardings = _shardings(state, layout)
    order = sorted(tensors, key=lambda tensor: _position(source.entries.get(tensor.name)))
    largest = max(entry.bytes for entry in source.entries.values())
    filler = _Filler(variables, places, shardings, dtype, largest)
    for tensor in order:
        entry = source.entries.get(tensor.name)
        if entry is None:
            continue  # a repetition that the files spare
        if tensor.same_as is not None:
            _check_same(entry, source.entries[tensor.same_as])
        else:
            filler.fill(tensor, entry)
    return nnx.merge(graph, nnx.from_flat_state(filler.variables()))


def _position(entry: Entry | None) -> tuple[str, int]:
    return ("", 0) if entry is None else (str(entry.path), entry.offset)


def _check_same(entry: Entry, other: Entry) -> None:
    if entry.dtype != other.dtype or not np.array_equal(entry.read().view(np.uint8), other.read().view(np.uint8)):
        raise ValueError(
            f"{entry.name} differs from {other.name}, and config.json says that the two are tied: they must be the same"
        )


def _shardings(state: nnx.State, layout: Layout | None) -> dict[tuple[Any, ...], Any]:
    if layout is None:
        return {}
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(layout.shardings(state))}


class _Filler:
    """Arrays that fill up, piece by piece; the largest tensor has so many bytes."""

    def __init__(self, variables: dict, places: dict[str, Place], shardings: dict, dtype: np.dtype, largest: int):
        self.abstract, self.places, self.shardings, self.dtype = variables, places, shardings, dtype
        self.leaves: dict[Leaf, jax.Array] = {}
        self.space, self.part_space = np.empty(largest, np.uint8), aligned(0)

    def fill(self, tensor: FileTensor, entry: Entry) -> None:
        """Read a tensor and put it where its pieces belong."""
        array = entry.read(self.space)
        for piece in tensor.pieces:
            self._put(piece, array)
            # Else tensors would queue up in memory faster than they are copied; and the next one uses the same memory.
            jax.block_until_ready(self.leaves[self.places[piece.path].leaf])

    def _put(self, piece: Piece, array: np.ndarray) -> None:
        place = self.places[piece.path]
        variable = self.abstract[place.variable]
        shape = array_of(variable.get_value(), place.part).shape
        dtype = wanted_dtype(variable, place.part, self.dtype)
        sharding = array_of(self.shardings[place.variable], place.part) if self.shardings else None
        index, seen = (*place.repeat, *piece.index), piece.view(array)
        if seen.shape == shape:
            self.leaves[place.leaf] = _part(seen, dtype, sharding, 0, None)
            return
        size = seen.size * dtype.itemsize
        if self.part_space.size < size:
            self.part_space = aligned(size)
        part = _part(seen, dtype, sharding, len(index), self.part_space)
        leaf = self.leaves.get(place.leaf)
        leaf = _zeros(shape, dtype, sharding) if leaf is None else leaf
        starts = (*index, *[0] * (len(shape) - len(index) - 1), piece.start)
        self.leaves[place.leaf] = _update(leaf, part, np.array(starts, np.int32))

    def variables(self) -> dict[tuple[Any, ...], nnx.Variable]:
        """The variables with their arrays."""
        done = {}
        for path, variable in self.abstract.items():
            value = variable.get_value()
            if (path, None) in self.leaves:
                value = self.leaves[path, None]
            else:
                value = dataclasses.replace(value, codes=self.leaves[path, "codes"], scales=self.leaves[path, "scales"])
            done[path] = variable.replace(value)
        return done


def _part(
    seen: np.ndarray, dtype: np.dtype, sharding: NamedSharding | None, leading: int, space: np.ndarray | None
) -> jax.Array:
    """A piece on the devices in a dtype, made in `space` or in memory of its own. On a mesh each device gets its share
    alone, without the `leading` axes of the array that the piece is one entry of."""
    if sharding is None:
        return jax.device_put(contiguous(seen, dtype, space))
    spec = (*sharding.spec, *[None] * (seen.ndim + leading - len(sharding.spec)))[leading:]
    own = NamedSharding(sharding.mesh, _dividing(PartitionSpec(*spec), seen.shape, sharding))
    return jax.make_array_from_callback(seen.shape, own, lambda index: contiguous(seen[index], dtype))


def _dividing(spec: PartitionSpec, shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """The split, but whole along axes of which the piece is a part that does not divide."""
    entries = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in entry) for entry in entries]
    pairs = zip(entries, parts, shape, strict=True)
    return PartitionSpec(*[entry if entry and length % count == 0 else None for entry, count, length in pairs])


def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    return _filled_with_zeros(sharding or SingleDeviceSharding(jax.local_devices()[0]))(shape, dtype)


@functools.lru_cache(maxsize=64)
def _filled_with_zeros(sharding: Any) -> Any:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _update(leaf: jax.Array, part: jax.Array, starts: np.ndarray | jax.Array) -> jax.Array:
    """Write a part into an array in place; its place is no constant, so that one program serves all experts."""
    part = part.reshape(*[1] * (leaf.ndim - part.ndim), *part.shape)
    return jax.lax.dynamic_update_slice(leaf, part, list(starts))
