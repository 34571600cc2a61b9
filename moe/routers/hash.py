"""Hash routing: a fixed table says which experts a token id has.

Roller et al. 2021, "Hash Layers For Large Sparse Models", https://arxiv.org/abs/2106.04426. Nothing is learned, and
nothing about a token but its id is looked at.

Letters: T tokens, V vocabulary, E experts, K experts per token.
"""

import abc
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..routing import Router, RouterState, Routing, RoutingContext, check_choices


class HashTable(abc.ABC):
    """Configuration of a hash router's table.

    A table from a corpus is a class of your own, in the recipe: its fields say which corpus, and its `build` counts the
    ids and returns `balanced_table(counts, experts, k)`.
    """

    @abc.abstractmethod
    def build(self, *, vocab: int, experts: int, k: int, key: jax.Array) -> Int[Array, "V K"] | Int[np.ndarray, "V K"]:
        """The experts of each token id, int32, 0 to E - 1, no expert twice for one id."""


@dataclass(frozen=True, kw_only=True)
class RandomTable(HashTable):
    """Every expert gets equally many token ids, at random. The load is as even as the ids are frequent."""

    def build(self, *, vocab: int, experts: int, k: int, key: jax.Array) -> Int[Array, "V K"]:
        order, steps = jax.random.split(key)
        place = jax.random.permutation(order, vocab)
        # E ids that share their steps around the circle of experts give each expert k ids; other E ids, other company.
        keys = jax.random.split(steps, -(-vocab // experts))
        step = jax.vmap(lambda key: jax.random.permutation(key, experts)[:k])(keys)
        return ((place[:, None] + step[place // experts]) % experts).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Hash(Router):
    """A token goes to the k experts that a table holds for its id, and each weighs 1 / k.

    The paper's MultiHash concatenates parts of k experts; here k whole experts are averaged. Needs `context.token_ids`.
    An id outside of the vocabulary goes to nobody. Nothing is learned: `MoE(losses=())`.
    """

    vocab: int = 264
    """Vocabulary size V of the table."""
    k: int = 1
    """Experts per token."""
    table: HashTable = RandomTable()
    """Makes the table. The paper's best balance comes from frequencies, see `balanced_table`."""

    def __post_init__(self):
        for name in ("vocab", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Hash.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def weight_sum(self) -> float | None:
        return 1.0

    @property
    def vocabulary(self) -> int | None:
        return self.vocab

    def build(self, *, width: int, experts: int, key: jax.Array) -> "HashRouter":
        check_choices(self, experts, "k")
        table = self.table.build(vocab=self.vocab, experts=experts, k=self.k, key=key)
        if table.shape != (self.vocab, self.k) or table.dtype != jnp.int32:
            raise ValueError(
                f"Hash.table is {self.table}, which built {table.dtype}{list(table.shape)}; it must be "
                f"int32[{self.vocab}, {self.k}]"
            )
        if isinstance(table, np.ndarray) and not ((table >= 0) & (table < experts)).all():
            raise ValueError(
                f"Hash.table is {self.table}, which built experts from {table.min()} to {table.max()}; allowed are 0 "
                f"to {experts - 1}"
            )
        return HashRouter(table, experts=experts)


class HashRouter(nnx.Module):
    """The table, which no call changes and no optimizer sees; `router.table[...] = balanced_table(...)` replaces it."""

    def __init__(self, table: Int[Array, "V K"] | Int[np.ndarray, "V K"], *, experts: int):
        self.experts = experts
        self.table = RouterState(jnp.asarray(table))

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        ids = context.token_ids
        if ids is None:
            raise ValueError("context.token_ids is None; a hash router needs the token ids")
        table = self.table[...]
        expert = table.at[ids].get(mode="fill", fill_value=self.experts, wrap_negative_indices=False)
        if context.mask is not None:
            expert = jnp.where(context.mask[:, None], expert, self.experts)
        share = 1.0 / table.shape[1]
        weight = jnp.where(expert < self.experts, share, 0.0)
        probs = jax.nn.one_hot(expert, self.experts).sum(axis=1) * share
        # There are no logits: zeros are those of a router without an opinion.
        return Routing(expert.reshape(-1), weight.reshape(-1), None, jnp.zeros_like(probs), probs), None


def balanced_table(counts: Sequence[int] | Int[np.ndarray, " V"], experts: int, k: int = 1) -> Int[np.ndarray, "V K"]:
    """A table by which the experts get equally many tokens of a corpus: the paper's balanced assignment.

    From the most frequent id to the rarest, each goes to the k experts that have the fewest tokens so far. Balanced on
    one text is nearly balanced on others like it, but for ids so frequent that one alone is more than an even share.

    Args:
        counts: how often each token id occurs in the corpus [V].
        experts: E.
        k: K, experts of each id.

    Returns:
        The experts of each id, int32.

    Raises:
        ValueError: there are no counts, or negative ones, or fewer than k experts.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size or counts.min() < 0:
        raise ValueError(f"counts have shape {counts.shape}; there must be one per token id, none below 0")
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}; with {experts} experts it must be from 1 to {experts}")
    table = np.zeros((counts.size, k), np.int32)
    # A heap of (tokens so far, ids so far, expert): ids that the corpus lacks are dealt out evenly too.
    busy = [(0, 0, expert) for expert in range(experts)]
    for token_id in np.argsort(-counts, kind="stable"):
        chosen = [heapq.heappop(busy) for _ in range(k)]
        table[token_id] = [expert for _, _, expert in chosen]
        for tokens, ids, expert in chosen:
            heapq.heappush(busy, (tokens + int(counts[token_id]), ids + 1, expert))
    return table
