"""What a router did with a text, counted: experts chosen together, the experts of each token id, load by halves.

The devices hand back assignments and an [E, E] product for each batch. Counts by token id are kept on the host, so that
an accelerator never holds them. Letters: E experts, T tokens of a batch, A assignments, U token ids that are counted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...moe import Routing, Tap
from ...moe.routing import tokens_of
from ...moe.telemetry import coactivation_counts
from ..data import HeldOut, Windows

MOST_CELLS = 1 << 27
"""Counts by token id that all layers may keep, 512 MiB; of more token ids, the most frequent are counted."""
PIECES = 10
"""Pieces of a text that are dealt to its two halves in turn."""


class RoutingCounts(NamedTuple):
    """One layer's routing of a text as the router chose it, also what a dispatcher then dropped; padding left out."""

    together: Int[np.ndarray, "E E"]
    """Tokens that went to both of two experts; on the diagonal, those that went to one."""
    tokens: int
    """Tokens of the text."""
    ids: Int[np.ndarray, " U"]
    """Token ids that are counted, the most frequent first."""
    occurrences: Int[np.ndarray, " U"]
    """How often each stands in the text."""
    by_id: Int[np.ndarray, "U E"]
    """How many of its assignments went to each expert."""
    halves: Int[np.ndarray, "2 E"]
    """Assignments to each expert in two halves of the text, every other tenth of it in each: how much they differ says
    how much of a difference between two texts is chance."""


class Seen(NamedTuple):
    """What the devices hand back of one layer and batch."""

    expert: Int[Array, " A"]
    """E at padding, whatever the router did there."""
    token: Int[Array, " A"]
    together: Int[Array, "E E"]


def watch(mask: Bool[Array, " T"]) -> Tap:
    """A tap that hands back a `Seen` of every layer that routes. `mask` is False at padding."""

    def tap(path: str, activations: Float[Array, "..."], routing: Routing | None) -> Seen | None:
        if routing is None:
            return None
        token = tokens_of(routing)
        real = routing._replace(expert=jnp.where(mask[token], routing.expert, routing.probs.shape[1]))
        return Seen(real.expert, token, coactivation_counts(real))

    return tap


class TextIndex(NamedTuple):
    """Which token ids of a text are counted, and in which row."""

    ids: Int[np.ndarray, " U"]
    occurrences: Int[np.ndarray, " U"]
    tokens: int
    rows: Int[np.ndarray, " V"]
    """The row of each token id up to the largest; U where it is not counted."""


def index_text(text: HeldOut, *, most: int) -> TextIndex:
    """The `most` most frequent token ids of a text."""
    ids, occurrences = np.unique(np.concatenate([_real(batch) for batch in text.batches]), return_counts=True)
    kept = np.argsort(-occurrences, kind="stable")[: max(most, 1)]
    rows = np.full(int(ids[-1]) + 1, kept.size)
    rows[ids[kept]] = np.arange(kept.size)
    return TextIndex(ids[kept], occurrences[kept], int(occurrences.sum()), rows)


class Tally:
    """Adds up one layer's counts, batch after batch."""

    def __init__(self, index: TextIndex, experts: int):
        self.index = index
        self.together = np.zeros((experts, experts), np.int64)
        self.by_id = np.zeros((index.ids.size, experts), np.int32)
        self.halves = np.zeros((2, experts), np.int64)

    def add(self, windows: Windows, before: int, seen: Any) -> int:
        """Count a batch that stands behind `before` tokens of the text; returns its number of assignments."""
        mask = (windows.segments[:, :-1] > 0).reshape(-1)
        place = before + np.cumsum(mask) - 1
        half = place * PIECES // self.index.tokens % 2
        row = self.index.rows[np.where(mask, windows.tokens[:, :-1].reshape(-1), self.index.ids[0])]
        real = seen.expert < self.together.shape[0]
        expert, token = seen.expert[real], seen.token[real]
        counted = row[token] < self.index.ids.size
        np.add.at(self.by_id, (row[token][counted], expert[counted]), 1)
        np.add.at(self.halves, (half[token], expert), 1)
        self.together += seen.together
        return int(real.sum())

    def counts(self) -> RoutingCounts:
        index = self.index
        return RoutingCounts(self.together, index.tokens, index.ids, index.occurrences, self.by_id, self.halves)


def real_tokens(windows: Windows) -> int:
    """How many inputs of a batch are no padding."""
    return int((windows.segments[:, :-1] > 0).sum())


def _real(windows: Windows) -> Int[np.ndarray, " T"]:
    return windows.tokens[:, :-1][windows.segments[:, :-1] > 0]
