"""The safetensors format, read tensor by tensor: nothing is trusted that the file says of itself.

A file is 8 bytes, the length N of the header, little endian; N bytes of JSON, `{name: {"dtype", "shape",
"data_offsets": [begin, end]}}` and perhaps "__metadata__", strings by name; then the data, without holes.
https://huggingface.co/docs/safetensors. The package of that name gives NumPy no bfloat16 and maps files into memory,
where a file that shrinks ends the process; so this reads with plain seeks.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
LONGEST_HEADER = 100_000_000
"""Bytes; the published implementation has the same limit."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    name: str
    dtype: str
    """As the format calls it: "BF16"."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of its first byte in the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, space: np.ndarray | None = None) -> np.ndarray:
        """The tensor, in the first of the bytes of `space` or in new memory, whose first use costs as much as reading.

        Raises:
            OSError: the file has become shorter.
        """
        buffer = np.empty(self.bytes, np.uint8) if space is None else space[: self.bytes]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.bytes:
                count = file.readinto(buffer[done:].data)
                if not count:
                    raise OSError(f"{self.path} ends within the tensor {self.name!r}; it was longer when it was opened")
                done += count
        return buffer.view(DTYPES[self.dtype]).reshape(self.shape)


class Header(NamedTuple):
    """What stands before the data of a file."""

    entries: tuple[Entry, ...]
    """In the order of the data."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; the data stay where they are.

    Raises:
        ValueError: the file is none, is truncated, or its header does not describe its data exactly.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} has {size} bytes and states a header of {length}; it is truncated or no safetensors file"
            )
        if length > LONGEST_HEADER:
            raise ValueError(f"{path} states a header of {length} bytes; allowed are {LONGEST_HEADER}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path} is a {type(header).__name__}; it must be an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ of {path} must be an object of strings")
    found = [_entry(path, name, record, 8 + length) for name, record in header.items()]
    found.sort(key=lambda entry: (entry.offset, entry.bytes))
    expected = 8 + length
    for entry in found:
        if entry.offset != expected:
            raise ValueError(
                f"{path}: the tensor {entry.name!r} begins at byte {entry.offset} of the file; the one before ends at "
                f"{expected}: tensors must neither overlap nor leave holes"
            )
        expected += entry.bytes
    if expected != size:
        raise ValueError(
            f"{path} has {size} bytes, and its header describes {expected}; it is truncated, or not what it says"
        )
    return Header(tuple(found), metadata)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _entry(path: Path, name: str, record: Any, data: int) -> Entry:
    where = f"{path}: the tensor {name!r}"
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is described by {_brief(record)}; there must be dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {_brief(dtype)}; known are {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise ValueError(f"{where} has shape {_brief(shape)}; it must be a list of numbers of 0 or more")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {_brief(offsets)}; they must be [begin, end], begin <= end")
    # A shape may claim anything; the file's own length bounds the offsets, and these the shape.
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if len(shape) > 32 or size != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where} is {dtype}{_brief(shape)}, which does not take the {_brief(offsets[1] - offsets[0])} bytes of "
            "its data_offsets"
        )
    return Entry(name, dtype, tuple(shape), path, data + offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


class Outgoing(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]
    """Called when it is its turn, so that one tensor at a time is in memory."""


def write_file(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor in the given order.

    Raises:
        OSError: it cannot be written.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
