"""Several small models as one of a cascade, whose members vote.

Kolawole et al. 2024, "Agreement-Based Cascading for Efficient Inference", https://arxiv.org/abs/2407.02348. With the
rule `Agreement` what they agree on stays. Letters: R rows, M members.
"""

from typing import Any

import numpy as np

from .cascade import CascadeModel
from .deferral import Answers


class Ensemble:
    """Classifiers that are all asked; the most frequent class is the answer, of equals the earlier member's."""

    def __init__(self, *, name: str, members: tuple[CascadeModel, ...]):
        if len(members) < 2:
            raise ValueError(f"Ensemble.members has {len(members)}; agreement takes two or more")
        self.name = name
        self.members = members
        self.cost = float(sum(member.cost for member in members))

    def __call__(self, inputs: Any) -> Answers:
        votes = np.stack([np.asarray(member(inputs).prediction) for member in self.members], axis=1)
        if votes.ndim != 2:
            raise ValueError(
                f"members of {self.name} answer in the shape {votes[:, 0].shape}; votes are one class a row"
            )
        support = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)
        return Answers(np.take_along_axis(votes, support.argmax(axis=1)[:, None], axis=1)[:, 0], votes=votes)
