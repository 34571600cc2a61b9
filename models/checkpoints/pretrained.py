"""A published model in memory, with what saving it again needs."""

from pathlib import Path
from typing import Any, NamedTuple

from ...compress import CoverageReport
from ..decoder import DecoderLM
from .family import Family
from .folder import Shard


class Pretrained(NamedTuple):
    """A model and where it comes from. After training: `pretrained._replace(model=trained)`."""

    model: DecoderLM
    config: dict[str, Any]
    """config.json, field by field, also those that nothing here reads."""
    family: Family
    dtypes: dict[str, str]
    """Of each tensor in the files, as safetensors calls it: saving rounds to these."""
    shards: tuple[Shard, ...] = ()
    """How the tensors were spread over files; () lets saving decide."""
    index: dict[str, Any] | None = None
    """model.safetensors.index.json."""
    files: tuple[Path, ...] = ()
    """The tokenizer's and the like, which saving copies."""
    left_out: tuple[str, ...] = ()
    """Tensors of the files that are no weights of the model."""
    coverage: CoverageReport | None = None
    """What became of every parameter, where they were packed while loading."""
