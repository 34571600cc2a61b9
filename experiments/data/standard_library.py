"""The Python standard library's own sources: text on every machine, without a network."""

import dataclasses
import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from .source import HELD_OUT_ONE_IN, Source, Split, check_split, summarize

# Not the library itself: what others installed, what Python compiled, and tests with odd text on purpose.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The `.py` files of this Python's standard library, one document each.

    About one file in twenty is held out, chosen by the SHA-256 of its relative path, so the split is the same on every
    machine. The text differs between Python versions: `describe` records the version and a hash.
    """

    def documents(self, split: Split) -> list[str]:
        check_split(split)
        tree = read_tree(_root())
        return tree.train if split == "train" else tree.validation

    def describe(self) -> dict[str, Any]:
        tree = read_tree(_root())
        return {
            "kind": "StandardLibrary",
            "python": platform.python_version(),
            "train": summarize(tree.train),
            "validation": summarize(tree.validation),
            "files_not_utf8": tree.skipped,
        }


class Tree(NamedTuple):
    """The Python files under a folder."""

    train: list[str]
    validation: list[str]
    skipped: int


def read_tree(root: Path) -> Tree:
    """Reads the Python files under a folder and splits them.

    Training files come in the order of their paths. Held-out files come in the order of their hashes, so that the
    first of them already are a fair sample.

    Args:
        root: the folder.

    Raises:
        ValueError: there is no readable Python file, or a file cannot be opened.
    """
    train: list[str] = []
    validation: list[tuple[bytes, str]] = []
    skipped = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        except OSError as error:
            raise ValueError(f"StandardLibrary: cannot read {path}: {error}") from error
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0:
            validation.append((digest, text))
        else:
            train.append(text)
    if not train and not validation:
        raise ValueError(f"StandardLibrary: no readable .py file under {root}; this Python came without its sources")
    return Tree(train, [text for _, text in sorted(validation)], skipped)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
