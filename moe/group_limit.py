"""Group-limited selection: a token's experts come from few of the groups that the experts are dealt into.

DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.2.2, and DeepSeek-V3, https://arxiv.org/abs/2412.19437, section
2.1.2, so that a token visits few devices. Letters: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """Neighbouring experts are a group; a token keeps the groups whose best experts score highest together."""

    groups: int = 8
    """Groups of E / groups experts (n_group in the published configurations)."""
    chosen: int = 4
    """Groups that a token may use (topk_group)."""
    best: int = 2
    """A group's score is the sum of its `best` highest: 2 in DeepSeek-V3, 1 in DeepSeek-V2."""

    def __post_init__(self):
        for name in ("groups", "chosen", "best"):
            if getattr(self, name) < 1:
                raise ValueError(f"GroupLimit.{name} is {getattr(self, name)}; it must be at least 1")
        if self.chosen > self.groups:
            raise ValueError(
                f"GroupLimit.chosen is {self.chosen}; with {self.groups} groups it must be at most {self.groups}"
            )

    def check(self, *, experts: int, k: int) -> None:
        """Raise ValueError where a router of k out of `experts` experts does not fit these groups."""
        if experts % self.groups:
            raise ValueError(f"GroupLimit.groups is {self.groups}; it must divide the {experts} experts")
        size = experts // self.groups
        if self.best > size:
            raise ValueError(f"GroupLimit.best is {self.best}; with groups of {size} experts it must be at most {size}")
        if k > self.chosen * size:
            raise ValueError(
                f"GroupLimit.chosen is {self.chosen}; {self.chosen} groups of {size} experts are too few for k={k}"
            )

    def __call__(self, selection: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """The scores by which experts are chosen, -inf outside of a token's groups."""
        grouped = selection.reshape(selection.shape[0], self.groups, -1)
        group_scores = jax.lax.top_k(grouped, self.best)[0].sum(axis=-1)
        _, chosen = jax.lax.top_k(group_scores, self.chosen)
        allowed = (chosen[:, :, None] == jnp.arange(self.groups)[None, None]).any(axis=1)
        return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(selection.shape)
