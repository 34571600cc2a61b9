"""What a source of text is: documents of two splits, and facts about them for the run's record."""

import abc
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

Split = Literal["train", "validation"]

HELD_OUT_ONE_IN = 20  # files, or a single file's share, kept for validation where the user names none


class Completion(NamedTuple):
    """A document of which only the second part is learned: the first is what it answers."""

    prompt: str
    completion: str


Document = str | Completion


def document_bytes(document: Document) -> bytes:
    """What is learned of a document, in UTF-8."""
    return (document if isinstance(document, str) else document.completion).encode()


def document_text(document: Document) -> str:
    """All that a model reads of a document."""
    return document if isinstance(document, str) else document.prompt + document.completion


class Source(abc.ABC):
    """Documents for training and validation.

    A source of your own derives from this class: a frozen dataclass with `documents` and `describe`.
    """

    @property
    def streams(self) -> bool:
        """Whether `documents` can only be read in order, and may be too long to hold in memory."""
        return False

    @abc.abstractmethod
    def documents(self, split: Split) -> Iterable[Document]:
        """The documents of a split, in an order that never changes."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Facts as JSON values, by which a reader of the run knows the text again."""

    def stream(self, split: Split, state: Any = None) -> Iterator[tuple[Document, Any]]:
        """Reads the documents in order from a saved position.

        This one skips what was read before. A source that can seek overrides it.

        Args:
            split: "train" or "validation".
            state: what came with the last document read, or None for the beginning.

        Returns:
            Pairs of a document and the position (JSON values) after it.
        """
        first = state or 0
        documents = itertools.islice(self.documents(split), first, None)
        return ((document, first + count) for count, document in enumerate(documents, 1))


def check_split(split: str) -> None:
    """Refuses a split that sources do not have."""
    if split not in get_args(Split):
        raise ValueError(f"split={split!r}: allowed are {' and '.join(map(repr, get_args(Split)))}")


def summarize(documents: Iterable[str]) -> dict[str, Any]:
    """Number, size in UTF-8 bytes and SHA-256 of some documents."""
    count, size, digest = 0, 0, hashlib.sha256()
    for document in documents:
        data = document.encode()
        count, size = count + 1, size + len(data)
        digest.update(len(data).to_bytes(8, "little") + data)
    return {"documents": count, "bytes": size, "sha256": digest.hexdigest()}
