"""Texts with labels: tables in files (tsv, csv, jsonl), or a Hugging Face dataset.

Letters: n texts, S tokens.
"""

import abc
import collections
import csv
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...models.text_classifier import PADDING
from .examples import Examples, ExampleSplit, LabelledSource, check_example_split, facts_of
from .extras import require
from .tokenizers import Bytes, Tokenizer

UNKNOWN = 0
"""The id of a word that is not in the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """The most frequent words of the training texts, split at white space: for texts that were tokenized before, as
    SST-2's. Id 0 is every other word."""

    size: int = 8000
    """Ids at most."""
    lowercase: bool = True
    """Whether "Film" and "film" are one word."""

    def __post_init__(self):
        if self.size < 2:
            raise ValueError(f"Words.size is {self.size}; it must be at least 2, one word and the unknown")

    def numbers(self, texts: Sequence[str]) -> dict[str, int]:
        """The id of each word, the most frequent first, in alphabetical order among equals."""
        counts = collections.Counter(word for text in texts for word in self.split(text))
        kept = sorted(counts, key=lambda word: (-counts[word], word))[: self.size - 1]
        return {word: number for number, word in enumerate(kept, UNKNOWN + 1)}

    def split(self, text: str) -> list[str]:
        """The words of a text."""
        return (text.lower() if self.lowercase else text).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledText(LabelledSource):
    """What sources of labelled texts share; one of your own derives from it and reads its rows."""

    text_column: str = "sentence"
    label_column: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    """What stands in the label's column for class 0, 1, ..."""
    length: int = 64
    """Tokens S of a text: shorter ones are padded, longer ones lose their end."""
    tokens: Tokenizer | Words = Bytes()
    """What makes ids of a text."""

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"{type(self).__name__}.length is {self.length}; it must be at least 1 token")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"{type(self).__name__}.labels is {self.labels}; it must name two or more, each once")

    @abc.abstractmethod
    def rows(self, split: ExampleSplit) -> Iterator[tuple[str, str]]:
        """Text and label of each row."""

    def texts(self, split: ExampleSplit) -> tuple[list[str], Int[np.ndarray, " n"]]:
        """The texts of a split and their classes.

        Raises:
            ValueError: a label is none of `labels`, or there is no row.
        """
        check_example_split(split)
        numbers = {name: number for number, name in enumerate(self.labels)}
        texts, found = [], []
        for number, (text, label) in enumerate(self.rows(split), 1):
            if label not in numbers:
                raise ValueError(
                    f"{self.place(split)}, row {number}: its label is {label!r}; allowed are {self.labels}"
                )
            texts.append(text)
            found.append(numbers[label])
        if not texts:
            raise ValueError(f"{self.place(split)}: there is no row in it")
        return texts, np.array(found, np.int32)

    def place(self, split: ExampleSplit) -> str:
        """Where a split comes from, for messages."""
        return f"{self}, {split}"

    def examples(self, split: ExampleSplit) -> Examples:
        texts, labels = self.texts(split)
        ids = np.full((len(texts), self.length), PADDING, np.int32)
        for row, tokens in zip(ids, self._encoded(texts), strict=True):
            row[: len(tokens)] = tokens[: self.length]
        return Examples(ids, labels)

    def class_names(self) -> tuple[str, ...]:
        return self.labels

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.tokens.size if isinstance(self.tokens, Words) else self.tokens.vocab_size

    def describe(self) -> dict[str, Any]:
        fields = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": type(self).__name__, **fields, "train": facts_of(self.examples("train"))}

    def _encoded(self, texts: list[str]) -> list[Any]:
        if isinstance(self.tokens, Tokenizer):
            return self.tokens.encode_many(texts)
        words, numbers = self.tokens, _numbers(self)
        return [[numbers.get(word, UNKNOWN) for word in words.split(text)] for text in texts]


@functools.lru_cache(maxsize=2)
def _numbers(source: LabelledText) -> dict[str, int]:
    assert isinstance(source.tokens, Words)
    return source.tokens.numbers(source.texts("train")[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledFiles(LabelledText):
    """A table of texts in a file for each split: .tsv and .csv with a header, or .jsonl with an object a line."""

    train: Path
    validation: Path
    test: Path

    def rows(self, split: ExampleSplit) -> Iterator[tuple[str, str]]:
        path: Path = getattr(self, split)
        if not path.is_file():
            raise ValueError(f"LabelledFiles.{split} is {path}; there is no such file")
        readers = {".tsv": _delimited, ".csv": _delimited, ".jsonl": _json_lines}
        if path.suffix not in readers:
            raise ValueError(f"LabelledFiles.{split} is {path}; its name must end in .tsv, .csv or .jsonl")
        for number, row in enumerate(readers[path.suffix](path), 1):
            columns = (row.get(self.text_column), row.get(self.label_column))
            if not isinstance(columns[0], str) or columns[1] is None:
                raise ValueError(
                    f"{path}, row {number}: it has {sorted(map(str, row))}; {self.text_column!r}, a text, and "
                    f"{self.label_column!r} are needed"
                )
            yield columns[0], str(columns[1])

    def place(self, split: ExampleSplit) -> str:
        return str(getattr(self, split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceText(LabelledText):
    """A dataset that `datasets.load_dataset` opens, as HuggingFaceText(path="glue", name="sst2")."""

    path: str
    """Name on the hub, or a local folder."""
    name: str | None = None
    """The dataset's configuration."""
    revision: str | None = None
    """Commit or tag on the hub, to record exactly what was read."""
    train: str = "train[:95%]"
    """Split, or a slice of one."""
    validation: str = "train[95%:]"
    test: str = "validation"

    def rows(self, split: ExampleSplit) -> Iterator[tuple[str, str]]:
        datasets = require("datasets")
        try:
            rows = datasets.load_dataset(self.path, self.name, split=getattr(self, split), revision=self.revision)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{self.place(split)} cannot be loaded: {error}") from error
        for column in (self.text_column, self.label_column):
            if column not in rows.column_names:
                raise ValueError(f"column {column!r}: {self.place(split)} has the columns {sorted(rows.column_names)}")
        return zip(rows[self.text_column], map(str, rows[self.label_column]), strict=True)


def _delimited(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
        else:  # a quotation mark in a .tsv is one
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: it is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: it is {line.strip()[:60]}; it must be an object")
            yield row
