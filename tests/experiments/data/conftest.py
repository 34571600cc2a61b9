"""A source and a stream that live in memory: also what a user's own source looks like."""

import dataclasses
from collections.abc import Iterable

import pytest

from dynamoe.experiments.data import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory(Source):
    train: tuple[str, ...] = dataclasses.field(repr=False)
    validation: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    streaming: bool = False

    @property
    def streams(self):
        return self.streaming

    def documents(self, split) -> Iterable[str]:
        documents = self.train if split == "train" else self.validation
        return iter(documents) if self.streaming else documents

    def describe(self):
        return {"kind": "InMemory"}


@pytest.fixture
def in_memory():
    return InMemory
