"""Figures of what experts specialise in, from counts: which work together, which tokens they take, which texts.

Muennighoff et al. 2024 (OLMoE), https://arxiv.org/abs/2409.02060, section 5. Beside every figure stands what chance
alone would give. Letters: E experts, U token ids.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .routing_counts import RoutingCounts

OFTEN = 10
"""A token id that stands less often in the text says little about itself; OLMoE's lists leave such ids out too."""


class Pair(NamedTuple):
    """Two experts that the router often chooses together."""

    first: int
    second: int
    tokens: int
    """That went to both."""
    of_first: float
    """Share of the first's tokens that also went to the second: OLMoE's co-activation."""
    of_second: float
    over_chance: float
    """Tokens over those that would be expected if the same number of pairs fell on experts by their load alone."""


class TokenSpecialization(NamedTuple):
    """How much of a layer's routing the token id alone decides; NaN where nothing could be measured."""

    entropy: float
    """Entropy of the expert of an assignment, in bits: what there is to decide."""
    information: float
    """Mutual information of token id and expert, in bits: the part that the token id decides."""
    information_by_chance: float
    """What would be measured on as many tokens if experts were drawn by their load, whatever the token."""
    favourite: float
    """Share of a token id's occurrences that go to the expert it goes to most, a mean over ids: OLMoE's vocabulary
    specialization, section 5.4, of all experts that are chosen and of ids that occur often."""
    favourite_by_chance: float
    often: int
    """Token ids that occur often."""
    counted: float
    """Share of the text's tokens whose ids are counted."""


def pairs_up(counts: RoutingCounts) -> bool:
    """Whether any token went to more than one expert."""
    return bool(counts.together.sum() > np.trace(counts.together))


def coactivation(together: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Share of the row's tokens that also went to the column, N_ij / N_i; NaN on the diagonal and for idle rows.

    OLMoE, section 5.2.
    """
    tokens = np.diagonal(together).astype(np.float64)
    shares = together / np.where(tokens > 0, tokens, np.nan)[:, None]
    np.fill_diagonal(shares, np.nan)
    return shares


def strongest_pairs(together: Int[np.ndarray, "E E"], *, most: int) -> list[Pair]:
    """The pairs with the largest N_ij / sqrt(N_i N_j): an expert with a handful of tokens does not lead by accident."""
    tokens = np.diagonal(together).astype(np.float64)
    first, second = np.triu_indices(len(together), 1)
    found, product = together[first, second], tokens[first] * tokens[second]
    expected = product * found.sum() / max(product.sum(), 1.0)
    order = np.argsort(-found / np.sqrt(np.maximum(product, 1.0)), kind="stable")[:most]
    return [
        Pair(
            first=int(first[i]),
            second=int(second[i]),
            tokens=int(found[i]),
            of_first=float(found[i] / tokens[first[i]]),
            of_second=float(found[i] / tokens[second[i]]),
            over_chance=float(found[i] / expected[i]),
        )
        for i in order
        if found[i]
    ]


def token_specialization(counts: RoutingCounts) -> TokenSpecialization:
    """Measure how far token ids decide the experts. Chance is one draw with a fixed seed."""
    by_id, often = counts.by_id, counts.occurrences >= OFTEN
    assigned = by_id.sum(axis=0).astype(np.float64)
    counted = float(counts.occurrences.sum() / counts.tokens)
    if not assigned.sum():
        return TokenSpecialization(*[math.nan] * 5, often=int(often.sum()), counted=counted)
    drawn = np.random.default_rng(0).multinomial(by_id.sum(axis=1), assigned / assigned.sum())
    return TokenSpecialization(
        entropy=_entropy(assigned),
        information=mutual_information(by_id),
        information_by_chance=mutual_information(drawn),
        favourite=_favourite(by_id[often], counts.occurrences[often]),
        favourite_by_chance=_favourite(drawn[often], counts.occurrences[often]),
        often=int(often.sum()),
        counted=counted,
    )


def mutual_information(counts: Int[np.ndarray, "U E"]) -> float:
    """Mutual information of row and column, in bits. Of few counts it is too large: see what chance gives."""
    return _entropy(counts.sum(axis=0)) + _entropy(counts.sum(axis=1)) - _entropy(counts)


def favourite_tokens(counts: RoutingCounts, expert: int, *, most: int) -> list[tuple[int, float]]:
    """The token ids that occur often with the largest shares of their occurrences that go to the expert, and those."""
    often = np.flatnonzero(counts.occurrences >= OFTEN)
    shares = counts.by_id[often, expert] / counts.occurrences[often]
    order = np.argsort(-shares, kind="stable")[:most]  # of equals, the more frequent id
    return [(int(counts.ids[often[i]]), float(shares[i])) for i in order if shares[i] > 0]


def total_variation(load: Float[np.ndarray, " E"], other: Float[np.ndarray, " E"]) -> float:
    """Share of the assignments that would have to move for one load to become the other: from 0 to 1."""
    return float(np.abs(load - other).sum() / 2)


def halves_apart(counts: RoutingCounts) -> float:
    """Total variation between the halves of a text: what two texts of one kind differ by. NaN where a half is empty."""
    sums = counts.halves.sum(axis=1)
    return total_variation(*(counts.halves / sums[:, None])) if sums.all() else math.nan


def _favourite(by_id: Int[np.ndarray, "U E"], occurrences: Int[np.ndarray, " U"]) -> float:
    return float(np.minimum(by_id.max(axis=1) / occurrences, 1.0).mean()) if occurrences.size else math.nan


def _entropy(counts: Int[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> float:
    """Of the distribution that the counts make, in bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
