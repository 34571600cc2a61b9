"""Published models into sharded device arrays, tensor by tensor.

    pretrained = from_pretrained("path/to/OLMoE-1B-7B-0924")
    logits = pretrained.model(tokens).logits

Beside the arrays that stay, the host holds one tensor of the file at a time, and its rounded copy.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ...compress import Rule
from ..decoder import Decoder, DecoderLM
from ..quantization import check_that_it_runs
from ..sharding import Layout
from .family import Family
from .fields import Fields
from .filling import filled
from .folder import Source, open_folder
from .llama2_c import is_llama2_c, open_llama2_c
from .mapping import FileTensor
from .packed_folder import is_packed_folder, open_packed_folder
from .packing import Packing
from .pretrained import Pretrained
from .registry import family_of
from .tensor_files import Entry

LISTED = 20
"""Wrong tensors that an error spells out; of the others it gives the number."""
FLOATS = ("F32", "F16", "BF16", "F64")


def from_pretrained(
    path: str | Path,
    *,
    layout: Layout | None = None,
    dtype: Any = jnp.float32,
    stacked: bool = False,
    quantize: Sequence[Rule] = (),
    leave: Sequence[str] = (),
) -> Pretrained:
    """Load a published model: a folder with config.json and safetensors, a file of llama2.c, or a folder that
    `save_pretrained` wrote of a packed one.

    Args:
        path: the folder or file; or where there is none of that name "organisation/name" on the Hugging Face hub, whose
            files huggingface_hub (an optional package) downloads into the user's cache. A local path needs no network.
        layout: the mesh, over which the arrays are born split; None: the default device.
        dtype: of parameters and of computing with them, float32 or bfloat16. Packed weights stay packed, and what
            routers remember stays in float32.
        stacked: equal layers as one scanned array (training) instead of one each (decoding).
        quantize: rules of which parameters are packed, as of `quantize_model`; none: all stay as they are. Each is
            packed as soon as it is whole, and its numbers given up: beside what is packed the host holds the parameters
            that are under way, those of a layer's experts if a file goes expert by expert. Wants unstacked layers.
        leave: patterns of parameters that stay as they are, whatever the rules say.

    Raises:
        ValueError: there is no model, its architecture or a value of its configuration is unknown, its files are
            broken, or tensors are missing, too many or of wrong shapes: all of these are named, and nothing is loaded.
        OSError: a file cannot be read.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; allowed are float32 and bfloat16")
    if quantize and (stacked or layout is not None):
        raise ValueError("quantize is given, with a layout or stacked layers; load without, on one device")
    if leave and not quantize:
        raise ValueError(f"leave is {tuple(leave)} and quantize empty; it takes parameters out of the rules")
    place = local_copy(path)
    if is_packed_folder(place):
        if quantize or stacked or layout is not None:
            raise ValueError(f"{place} is packed already; it loads unstacked, on one device, without rules")
        return open_packed_folder(place, jnp.dtype(dtype))
    source, fields, family, saved_as, decoder = _opened(place)
    tensors = checked_tensors(family, fields, decoder, source.entries)
    decoder = dataclasses.replace(decoder, dtype=jnp.dtype(dtype).name)
    abstract = abstract_model(family, fields, decoder, stacked)
    packing = Packing(abstract, quantize, leave, jnp.dtype(dtype)) if quantize else None
    model = filled(abstract, tensors, source, layout, jnp.dtype(dtype), packing)
    if packing is not None:
        check_that_it_runs(model)
    coverage = None if packing is None else packing.report
    dtypes = {entry.name: entry.dtype for entry in source.entries.values()}
    left_out = tuple(name for name in source.entries if family.left_out(name, decoder))
    files = (source.shards, source.index, source.files)
    return Pretrained(model, source.config, saved_as, dtypes, *files, left_out, coverage)


class Opened(NamedTuple):
    """A published model of which no weight is read yet."""

    source: Source
    fields: Fields
    family: Family
    """Reads it."""
    saved_as: Family
    """Writes it."""
    decoder: Decoder
    """Our configuration."""


def open_published(path: str | Path) -> Opened:
    """Read a published model's configuration and the headers of its files.

    Raises:
        ValueError: as `from_pretrained`; or its weights were packed by us.
    """
    place = local_copy(path)
    if is_packed_folder(place):
        raise ValueError(f"{place} holds weights that were packed; give the model that they were packed from")
    return _opened(place)


def _opened(place: Path) -> Opened:
    source, family = open_llama2_c(place) if is_llama2_c(place) else (open_folder(place), None)
    fields = Fields(source.config)
    saved_as = family_of(fields)
    family = saved_as if family is None else family
    return Opened(source, fields, family, saved_as, _decoder(family, fields, source))


def local_copy(path: str | Path) -> Path:
    """The folder or file of a published model; of one on the hub, its copy in the user's cache."""
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
