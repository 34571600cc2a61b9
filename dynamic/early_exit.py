"""The policy of early exit in decoding: who leaves, how sure it must be, and what becomes of the layers it skips.

Schuster et al. 2022 (CALM), https://arxiv.org/abs/2207.07061; Bae et al. 2023 (FREE), https://arxiv.org/abs/2310.05424.
"""

from dataclasses import dataclass
from typing import ClassVar

from .confidence import Confidence, Top2Gap
from .thresholds import Thresholds


class SkippedLayers:
    """How the layers that a token skipped come by its keys and values."""

    @property
    def waiting(self) -> int:
        """Tokens of a row that may wait before an exit for the layers behind it."""
        return 0


@dataclass(frozen=True, kw_only=True)
class PropagateState(SkippedLayers):
    """From the state at which it left, through each skipped layer's projections: CALM; Elbayad et al. 2020,
    https://arxiv.org/abs/1910.10073. Later tokens see other keys than the full model's."""


@dataclass(frozen=True, kw_only=True)
class DeferLayers(SkippedLayers):
    """The skipped layers run later, in parallel, when a later token of the row needs them: FREE. Later tokens see what
    the full model shows them."""

    most: int = 8
    """Tokens of a row that may wait before an exit; a further one goes deeper."""

    @property
    def waiting(self) -> int:
        return self.most

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"DeferLayers.most is {self.most}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RecomputeLayers(SkippedLayers):
    """As `DeferLayers`, but no states are kept: the tokens that wait run again from the embedding on."""

    most: int = 8
    """Tokens of a row that may wait before an exit; a further one goes deeper."""

    @property
    def waiting(self) -> int:
        return self.most

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"RecomputeLayers.most is {self.most}; it must be at least 1")


class BatchPolicy:
    """Who leaves together."""

    together: ClassVar[bool]
    """Whether the rows of a call go on and leave as one."""


@dataclass(frozen=True, kw_only=True)
class RowByRow(BatchPolicy):
    """Each row leaves by itself, and begins its next token while others go on."""

    together = False


@dataclass(frozen=True, kw_only=True)
class WholeBatch(BatchPolicy):
    """All rows of a call leave at the first exit at which every one of them is sure."""

    together = True


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A policy: what is calibrated, and what is then used."""

    thresholds: Thresholds
    """At which confidence a token leaves."""
    confidence: Confidence = Top2Gap()
    """How sure an exit is."""
    skipped: SkippedLayers = PropagateState()
    """What becomes of the layers that did not run."""
    batch: BatchPolicy = RowByRow()
    """Who leaves together."""
