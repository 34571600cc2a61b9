"""Published models in and out: one file per family, one loader and one writer for all."""

from .family import Family
from .load import from_pretrained, open_published
from .pretrained import Pretrained
from .save import as_pretrained, save_pretrained

__all__ = ["Family", "Pretrained", "as_pretrained", "from_pretrained", "open_published", "save_pretrained"]
