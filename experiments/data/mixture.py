"""Several sources, in fixed proportions."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from .source import Document, Source, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """Training windows drawn from several sources in proportion to weights.

    The proportions hold for windows, so for tokens, whatever the sources' sizes: a small source is repeated. They are
    kept by turns, not by chance, and exact to about one percent (Grain rounds them to integers).

    Args:
        sources: two or more.
        weights: one positive number for each; their sum does not matter.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sources) < 2 or not all(isinstance(source, Source) for source in self.sources):
            raise ValueError(f"sources={self.sources!r}: expected a tuple of two or more sources")
        if len(self.weights) != len(self.sources):
            raise ValueError(f"weights={self.weights!r}: expected {len(self.sources)} numbers, one for each source")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights!r}: expected finite numbers above 0")

    @property
    def streams(self) -> bool:
        return any(source.streams for source in self.sources)

    def documents(self, split: Split) -> Iterable[Document]:
        """All documents of all sources, one source after the other; weights do not act here."""
        return itertools.chain.from_iterable(source.documents(split) for source in self.sources)

    def describe(self) -> dict[str, Any]:
        sources = [source.describe() for source in self.sources]
        return {"kind": "Mixture", "weights": list(self.weights), "sources": sources}
