"""A published model with packed weights, in a folder of ours: transformers does not read it, `from_pretrained` does.

config.json        the family's, as it was published
packed/            see models/quantized_files.py
tokenizer files    those of the published model
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ..decoder import DecoderLM
from ..quantized_files import load_quantized, save_quantized
from .arrays import places_of
from .fields import Fields
from .folder import CONFIG, kept_files, read_json, write_json
from .pretrained import Pretrained
from .registry import family_of

PACKED = "packed"


def is_packed_folder(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / PACKED).is_dir()


def is_packed_further(pretrained: Pretrained) -> bool:
    """Whether a model holds packed weights that its family does not publish so."""
    fields = Fields(pretrained.config)
    family = pretrained.family
    config = pretrained.model.config
    published = nnx.eval_shape(lambda: family.prepared(config.build(jax.random.key(0), stacked=False), fields))
    return _packed_weights(pretrained.model) != _packed_weights(published)


def _packed_weights(model: DecoderLM) -> set[str]:
    return {path for path, place in places_of(model).items() if place.part is not None}


def save_packed_folder(pretrained: Pretrained, folder: Path) -> None:
    """Write the folder; it appears when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_quantized(pretrained.model, temporary / PACKED)
    for file in pretrained.files:
        shutil.copyfile(file, temporary / file.name)
    write_json(temporary / CONFIG, pretrained.config)
    temporary.rename(folder)


def open_packed_folder(folder: Path, dtype: np.dtype) -> Pretrained:
    """Read the folder, on the first device.

    Raises:
        ValueError: see `from_pretrained` and `load_quantized`.
    """
    config = read_json(folder / CONFIG)
    fields = Fields(config)
    family = family_of(fields)
    model = load_quantized(
        folder / PACKED, family.decoder(fields), dtype=dtype, prepare=lambda model: family.prepared(model, fields)
    )
    return Pretrained(model, config, family, {}, files=kept_files(folder))
