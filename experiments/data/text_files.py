"""Local text files."""

import dataclasses
import glob
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

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
        return split_of_files(self.train, self.validation, self._read, within=_split_text)

    def _read(self, argument: str, path: Path, data: bytes) -> list[str]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{argument}: {path} is not UTF-8 text ({error}); allowed are UTF-8 files") from error
        documents = text.split(self.separator) if self.separator else [text]
        return [document for document in documents if document.strip()]


T = TypeVar("T")


def split_of_files(
    train: tuple[str, ...],
    validation: tuple[str, ...],
    read: Callable[[str, Path, bytes], Iterable[T]],
    *,
    within: Callable[[T], tuple[list[T], list[T]]] | None = None,
) -> tuple[list[T], list[T]]:
    """The documents of both splits; how they come about says `TextFiles`.

    Args:
        train: paths or globs.
        validation: likewise; empty: a part of `train`.
        read: of the argument's name, a path and the file's bytes, the documents in it.
        within: parts a single document in two; None: it is all for training.
    """
    paths = _find("train", train)

    def documents(argument: str, paths: Iterable[Path]) -> list[T]:
        return [document for path in paths for document in read(argument, path, _bytes(argument, path))]

    if validation:
        others = _find("validation", validation)
        if both := sorted(set(paths) & set(others)):
            raise ValueError(f"validation={validation!r}: {both[0]} is also matched by train={train!r}")
        return documents("train", paths), documents("validation", others)
    if len(paths) == 1:
        all_of_it = documents("train", paths)
        if len(all_of_it) == 1 and within is not None:
            return within(all_of_it[0])
        cut = len(all_of_it) - max(1, len(all_of_it) // HELD_OUT_ONE_IN) if len(all_of_it) > 1 else len(all_of_it)
        return all_of_it[:cut], all_of_it[cut:]
    digests = {path: hashlib.sha256(_bytes("train", path)).digest() for path in paths}
    held_out = set(sorted(paths, key=lambda path: (digests[path], path))[: max(1, len(paths) // HELD_OUT_ONE_IN)])
    return (
        documents("train", [path for path in paths if path not in held_out]),
        documents("train", [path for path in paths if path in held_out]),
    )


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


def _split_text(text: str) -> tuple[list[str], list[str]]:
    share = len(text) // HELD_OUT_ONE_IN
    cut = len(text) - share
    # At the end of a line, unless lines are so long that the held-out part would more than double.
    cut = text.rfind("\n", cut - share, cut) + 1 or cut
    return [part for part in [text[:cut]] if part], [part for part in [text[cut:]] if part]
