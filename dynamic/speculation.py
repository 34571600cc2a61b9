"""Which drafted tokens the full model keeps, so that its distribution is the answer's.

Leviathan et al. 2022, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318. For drafts
of a model's own first layers, Elhoushi et al. 2024 (LayerSkip), https://arxiv.org/abs/2404.16710.

Letters: B rows, g drafted tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Accepted(NamedTuple):
    """What comes of a draft."""

    count: Int[Array, " B"]
    """How many drafted tokens are kept, from the first, 0 to g."""
    token: Int[Array, " B"]
    """What follows them: of the full model's own."""


def accept_greedy(
    drafted: Int[Array, "B g"], full: Int[Array, "B g1"], lengths: Int[Array, " B"] | None = None
) -> Accepted:
    """Keep tokens as long as they are the full model's most likely ones.

    Args:
        drafted: g tokens.
        full: the full model's most likely token at each of their places, and after the last: g + 1.
        lengths: how many tokens each row drafted, where some drafted fewer than g; None: all g.
    """
    same = (drafted == full[:, :-1]) & _drafted(drafted, lengths)
    count = jnp.cumprod(same.astype(jnp.int32), axis=1).sum(axis=1)
    return Accepted(count, jnp.take_along_axis(full, count[:, None], axis=1)[:, 0])


def accept_sampled(
    drafted: Int[Array, "B g"],
    draft: Float[Array, "B g V"],
    full: Float[Array, "B g1 V"],
    keys: Array,
    lengths: Int[Array, " B"] | None = None,
) -> Accepted:
    """Keep a token x with the probability min(1, p(x) / q(x)); the first that is not kept is drawn again from the part
    of p above q. After all, one more is drawn from p. So every token has the distribution p.

    Args:
        drafted: drawn from `draft`.
        draft: q, probabilities after the filters that p went through.
        full: p at each of their places, and after the last.
        keys: a PRNG key of each row [B].
        lengths: how many tokens each row drafted, where some drafted fewer than g; None: all g. A row may stop by what
            it knew before a token was drawn, not by the token.
    """
    rows, length = drafted.shape
    chances, redraws = jnp.split(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 2, axis=1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(chances[:, 0])
    p = jnp.take_along_axis(full[:, :-1], drafted[:, :, None], axis=2)[..., 0]
    q = jnp.take_along_axis(draft, drafted[:, :, None], axis=2)[..., 0]
    drawn = _drafted(drafted, lengths)
    kept = (uniform * q < p) & drawn  # p / q without a division; what was drawn has q > 0
    count = jnp.cumprod(kept.astype(jnp.int32), axis=1).sum(axis=1)
    row = jnp.arange(rows)
    # Past the last drafted token nothing was drafted: q is 0, and the rest is p itself.
    draft = jnp.where(drawn[:, :, None], draft, 0.0)
    refused = jnp.concatenate([draft, jnp.zeros_like(draft[:, :1])], axis=1)[row, count]
    rest = jnp.maximum(full[row, count] - refused, 0.0)
    return Accepted(count, jax.vmap(jax.random.categorical)(redraws[:, 0], jnp.log(rest)).astype(drafted.dtype))


def _drafted(tokens: Int[Array, "B g"], lengths: Int[Array, " B"] | None) -> Bool[Array, "B g"]:
    """Which of the tokens were drafted."""
    if lengths is None:
        return jnp.ones(tokens.shape, bool)
    return jnp.arange(tokens.shape[1])[None] < lengths[:, None]


def tokens_per_round(acceptance: float, drafted: int) -> float:
    """Expected tokens of a round, (1 - a^(g+1)) / (1 - a), where each drafted one is kept with the chance a."""
    return sum(acceptance**n for n in range(drafted + 1))


def predicted_speedup(acceptance: float, drafted: int, cost: float) -> float:
    """Over the full model alone, if a drafted token costs `cost` of it and a verification as much as one token:
    `tokens_per_round` over g cost + 1."""
    return tokens_per_round(acceptance, drafted) / (drafted * cost + 1)
