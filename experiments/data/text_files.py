"""Local text files."""

import dataclasses
import glob
import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

from .source import HELD_OUT_ONE_IN, Source, Split, check_split, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(Source):
    """UTF-8 text files of this machine, plain or packed by gzip (.gz).

    Without `validation`, one file in twenty (at least one) is held out, those with the lowest SHA-256 of their content.
    A single file gives its last twentieth: documents where `separator` finds several, else lines, else characters.

    Args:
        train: paths or globs (`**` descends); empty to measure on `validation` alone.
        validation: the same for the held-out text; empty to split `train`.
        separator: splits a file into documents, as "<|endoftext|>"; None: a file is one document.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    separator: str | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
                raise ValueError(f"{name}={patterns!r}: expected a tuple of paths or globs")
        if not self.train and not self.validation:
            raise ValueError("train=(): expected at least one path or glob, or validation alone to measure on")
        if self.separator == "":
            raise ValueError("separator='': expected None or text that stands between documents")

    def documents(self, split: Split) -> list[str]:
        check_split(split)
        train, validation = self._split()
        return train if split == "train" else validation

    def describe(self) -> dict[str, Any]:
        train, validation = self._split()
        return {
            "kind": "TextFiles",
            "files": list(self.train),
            "validation_files": list(self.validation),
            "separator": self.separator,
            "train": summarize(train),
            "validation": summarize(validation),
        }

    def _split(self) -> tuple[list[str], list[str]]:
        train = _find("train", self.train)
        if self.validation:
            validation = _find("validation", self.validation)
            if both := sorted(set(train) & set(validation)):
                raise ValueError(f"validation={self.validation!r}: {both[0]} is also matched by train={self.train!r}")
            return self._read("train", train), self._read("validation", validation)
        if len(train) == 1:
            return _split_documents(self._read("train", train))
        digests = {path: hashlib.sha256(_bytes("train", path)).digest() for path in train}
        held_out = set(sorted(train, key=lambda path: (digests[path], path))[: max(1, len(train) // HELD_OUT_ONE_IN)])
        return (
            self._read("train", [path for path in train if path not in held_out]),
            self._read("train", [path for path in train if path in held_out]),
        )

    def _read(self, argument: str, paths: list[Path]) -> list[str]:
        documents: list[str] = []
        for path in paths:
            try:
                text = _bytes(argument, path).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{argument}: {path} is not UTF-8 text ({error}); allowed are UTF-8 files") from error
            documents += text.split(self.separator) if self.separator else [text]
        return [document for document in documents if document.strip()]


def _find(argument: str, patterns: tuple[str, ...]) -> list[Path]:
    paths: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        exact = Path(expanded)  # a file whose name holds [ or * is still that file
        found = [exact] if exact.is_file() else [Path(p) for p in glob.glob(expanded, recursive=True)]
        files = [path for path in found if path.is_file()]
        if not files:
            raise ValueError(f"{argument}: {pattern!r} matches no file; allowed are paths and globs of existing files")
        paths.update(path.resolve() for path in files)
    return sorted(paths)


def _bytes(argument: str, path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{argument}: cannot read {path} ({error}); allowed are readable UTF-8 files") from error


def _split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    if len(documents) > 1:
        cut = len(documents) - max(1, len(documents) // HELD_OUT_ONE_IN)
        return documents[:cut], documents[cut:]
    text = documents[0] if documents else ""
    share = len(text) // HELD_OUT_ONE_IN
    cut = len(text) - share
    # At the end of a line, unless lines are so long that the held-out part would more than double.
    cut = text.rfind("\n", cut - share, cut) + 1 or cut
    return [part for part in [text[:cut]] if part], [part for part in [text[cut:]] if part]
