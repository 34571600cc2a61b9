"""Tables of what routers do: load, movement over the steps, pairs of experts, tokens, texts compared."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .data import Tokenizer
from .data.token_names import token_name
from .page import Table
from .training.routers import RouterHistory, RouterStatistics, entropy_share
from .training.specialization import (
    OFTEN,
    favourite_tokens,
    halves_apart,
    pairs_up,
    strongest_pairs,
    token_specialization,
    total_variation,
)

MOST_PAIRS = 5
"""Pairs of experts that are shown of a layer; one at least, and of many layers fewer, so that they fill a screen."""
MOST_TOKENS = 8
"""Token ids that are shown of each expert."""
MOST_EXPERTS = 64
"""Experts whose tokens are shown of a layer, the busiest."""
MOST_DIFFERENCES = 12
"""Experts that are shown where texts are compared."""

Measured = tuple[str, Sequence[RouterStatistics]]
"""The name of a text, and what every layer's router did with it."""


def router_table(statistics: Sequence[RouterStatistics], measured_on: str) -> Table:
    """What each layer's router does: load of its busiest and idlest expert over the even share, entropy, drops."""
    rows = [
        (
            str(layer.layer),
            str(layer.load.size),
            f"{layer.load.max() * layer.load.size:.3f}",
            f"{layer.load.min() * layer.load.size:.3f}",
            f"{layer.max_violation:.3f}",
            f"{layer.entropy:.3f}",
            _number(entropy_share(layer.entropy, layer.load.size)),
            f"{layer.dropped:.2%}",
        )
        for layer in statistics
    ]
    columns = ("layer", "experts", "busiest", "idlest", "MaxVio", "entropy, nats", "of log E", "dropped")
    caption = f"Measured on {measured_on}. Busiest and idlest: the load of an expert over the even share, 1 / experts."
    return Table(columns, rows, caption)


def movement_table(history: Mapping[int, RouterHistory]) -> Table:
    """How each layer's router moved: figures of the first, the middle and the last logged batch."""
    rows = []
    for layer, of in history.items():
        places = first_middle_last(len(of.steps))
        entropy = [_number(entropy_share(of.entropy[place], of.load.shape[1])) for place in places]
        violation = [f"{of.max_violation[place]:.3f}" for place in places]
        dropped = [f"{of.dropped[place]:.2%}" for place in places]
        rows.append((str(layer), *map(_moves, (entropy, violation, dropped))))
    steps = next(iter(history.values())).steps
    shown = " → ".join(f"{steps[place]:,}" for place in first_middle_last(len(steps)))
    return Table(("layer", "entropy of log E", "MaxVio", "dropped"), rows, f"Training batches of steps {shown}.")


def pairs_table(statistics: Sequence[RouterStatistics]) -> Table:
    """The strongest pairs of each layer that sends tokens to several experts."""
    paired = [(layer.layer, layer.counts) for layer in statistics if layer.counts and pairs_up(layer.counts)]
    most = min(MOST_PAIRS, max(1, 24 // max(len(paired), 1)))
    rows = []
    for layer, counts in paired:
        for pair in strongest_pairs(counts.together, most=most):
            shares = (f"{pair.of_first:.1%}", f"{pair.of_second:.1%}")
            pair_name = f"{pair.first} and {pair.second}"
            rows.append((str(layer), pair_name, f"{pair.tokens:,}", *shares, f"{pair.over_chance:.2f}"))
    columns = ("layer", "experts", "tokens of both", "of the first's", "of the second's", "over chance")
    caption = (
        "Pairs of experts that take the same tokens most often. Over chance: tokens of both over those that the two "
        "experts' load alone would give."
    )
    return Table(columns, rows, caption)


def token_table(statistics: Sequence[RouterStatistics]) -> Table:
    """How far the token id alone decides the expert, layer by layer."""
    found = {layer.layer: token_specialization(layer.counts) for layer in statistics if layer.counts}
    rows = [
        (
            str(layer),
            *(_number(value) for value in (of.entropy, of.information, of.information_by_chance)),
            *(_percent(value) for value in (of.favourite, of.favourite_by_chance)),
        )
        for layer, of in found.items()
    ]
    columns = ("layer", "entropy, bits", "known by token", "by chance", "favourite expert", "by chance")
    often, counted = max((of[-2:] for of in found.values()), default=(0, 1.0))
    caption = (
        "Known by token: mutual information of the token id and the expert of an assignment, in bits; the most there "
        "can be is the entropy, less log2 K with K experts per token. The rest is decided by the context. "
        f"Favourite expert: share of a token id's occurrences that go to its most frequent expert, a mean over "
        f"{often:,} ids that occur {OFTEN} times or more. By chance: the same for experts drawn by their load."
    )
    if counted < 1:
        caption += f" Only the most frequent ids are counted, {counted:.1%} of the text."
    return Table(columns, rows, caption)


def favourites_table(layer: RouterStatistics, tokenizer: Tokenizer) -> Table:
    """The tokens that each expert of a layer takes most of."""
    if layer.counts is None:
        raise ValueError(f"the tokens of layer {layer.layer} were not counted; measure the routers on a text")
    shown = np.sort(np.argsort(-layer.load, kind="stable")[:MOST_EXPERTS])
    rows = []
    for expert in shown.tolist():
        favourites = favourite_tokens(layer.counts, expert, most=MOST_TOKENS)
        names = [f"{token_name(tokenizer, token)} {share:.0%}" for token, share in favourites]
        rows.append((str(expert), f"{layer.load[expert] * layer.load.size:.2f}", "   ".join(names) or "–"))
    caption = f"Layer {layer.layer}. The share of a token's occurrences that go to the expert, the largest first."
    if len(shown) < layer.load.size:
        caption += f" The {len(shown)} busiest of {layer.load.size} experts."
    return Table(("expert", "load, times even", "tokens"), rows, caption)


def comparison_table(texts: Sequence[Measured]) -> Table:
    """How far the load of each layer differs between the first text and the others, and between halves of one text.

    A load times the experts per token is OLMoE's domain specialization: Muennighoff et al. 2024,
    https://arxiv.org/abs/2409.02060, section 5.3, for all experts that are chosen.
    """
    (_, first), *others = texts
    letters, named = lettered(texts)
    rows = []
    for place, layer in enumerate(first):
        apart = [total_variation(layer.load, of[place].load) for _, of in others]
        floors = [halves_apart(counts) for _, of in texts if (counts := of[place].counts)]
        rows.append((str(layer.layer), *map(_number, apart), _number(max(floors, default=math.nan))))
    columns = ("layer", *(f"A to {letter}" for letter in letters[1:]), "halves of one text")
    caption = (
        f"{named}. The share of the assignments that would have to change their expert for the load on one text to "
        "become the other's (total variation). Halves of one text: the largest such distance within a text, every "
        "other tenth of it against the rest; a difference that is not clearly larger may be chance."
    )
    return Table(columns, rows, caption)


def differences_table(texts: Sequence[Measured]) -> Table:
    """The experts whose load differs most between texts."""
    loads = {
        (of[0].layer, expert): [float(layer.load[expert] * layer.load.size) for layer in of]
        for of in zip(*(statistics for _, statistics in texts), strict=True)
        for expert in range(of[0].load.size)
    }
    order = sorted(loads, key=lambda of: min(loads[of]) - max(loads[of]))[:MOST_DIFFERENCES]
    rows = [(f"layer {at[0]}, expert {at[1]}", *(f"{load:.2f}" for load in loads[at])) for at in order]
    letters, named = lettered(texts)
    caption = f"Load, 1 = the even share, of the experts that differ most. {named}."
    return Table(("expert", *letters), rows, caption)


def lettered(texts: Sequence[Measured]) -> tuple[list[str], str]:
    """A letter for each text, A the first, and a list of which is which."""
    letters = [chr(ord("A") + place) for place in range(len(texts))]
    return letters, "; ".join(f"{letter}: {name}" for letter, (name, _) in zip(letters, texts, strict=True))


def first_middle_last(count: int) -> list[int]:
    return sorted({0, (count - 1) // 2, count - 1})


def _moves(values: Sequence[str]) -> str:
    return " → ".join(values if len(set(values)) > 1 else values[:1])


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"
