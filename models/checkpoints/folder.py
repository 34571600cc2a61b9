"""A folder with a published model: config.json, safetensors files, perhaps their index, a tokenizer's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .tensor_files import Entry, read_header

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
KEPT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config.json")
KEPT_ALSO = ("chat_template.*", "*.tiktoken", "*.model")
"""Files that are copied when the model is saved."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Shard(NamedTuple):
    """One file of tensors."""

    name: str
    tensors: tuple[str, ...]
    """In the order of their data."""
    metadata: dict[str, str]


class Source(NamedTuple):
    """What a published model consists of, before any weight is read."""

    config: dict[str, Any]
    entries: dict[str, Entry]
    """By the name of the tensor."""
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    """model.safetensors.index.json, where there is one."""
    files: tuple[Path, ...]
    """Those of the tokenizer and the like."""


def open_folder(folder: Path) -> Source:
    """Read the configuration and the headers of all files in a folder.

    Raises:
        ValueError: there is no such folder or no model in it, a file is broken, a tensor is where the index does not
            say, or a file lies outside of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"path is {folder}; there is no such folder")
    config = read_json(_inside(folder, CONFIG))
    index, names = None, [SINGLE]
    if (folder / INDEX).exists():
        index = read_json(_inside(folder, INDEX))
        names = _files_of(index, folder)
    elif not (folder / SINGLE).exists():
        raise ValueError(_nothing_there(folder))
    entries: dict[str, Entry] = {}
    shards = []
    for name in names:
        header = read_header(_inside(folder, name))
        for entry in header.entries:
            if entry.name in entries:
                raise ValueError(f"the tensor {entry.name!r} stands in {entries[entry.name].path.name} and in {name}")
            entries[entry.name] = entry
        shards.append(Shard(name, tuple(entry.name for entry in header.entries), header.metadata))
    if index is not None:
        paths = {name: _inside(folder, name).name for name in names}
        for tensor, file in index["weight_map"].items():
            if tensor not in entries or entries[tensor].path.name != paths[file]:
                raise ValueError(f"{INDEX} says that {tensor!r} is in {file}; it is not")
    return Source(config, entries, tuple(shards), index, kept_files(folder))


def kept_files(folder: Path) -> tuple[Path, ...]:
    """The files of the tokenizer and the like."""
    kept = {file for pattern in (*KEPT, *KEPT_ALSO) for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(kept))


def read_json(path: Path) -> dict[str, Any]:
    """Read an object. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}; a published model has one")
    try:
        data = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error or type(error).__name__}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; it must be an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files_of(index: dict[str, Any], folder: Path) -> list[str]:
    """The file names of an index, in order."""
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"weight_map of {folder / INDEX} must be an object from tensors' names to files")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX} names the file {name!r}; allowed are names of .safetensors files that lie beside it"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{INDEX} names the file {name!r}, which is not there")
    return names


def _inside(folder: Path, name: str) -> Path:
    """The file with its links resolved; it must lie in the folder, or in the blobs of the hub's cache around it."""
    home, file = folder.resolve(), (folder / name).resolve()
    blobs = home.parent.parent / "blobs"
    in_cache = home.parent.name == "snapshots" and file.parent == blobs
    if file.parent != home and not in_cache:
        raise ValueError(f"{folder / name} leads to {file}, outside of the folder; it is not read")
    return file if not in_cache else folder / name


def _nothing_there(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {', '.join(pickles[:3])} and no {SINGLE}; a pickle is not read, for loading one runs "
            "whatever program is in it: convert it to safetensors where you trust it"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}"
