"""The idx format of MNIST: a big-endian header (two zero bytes, a type, a number of dimensions, their lengths), then
the values. http://yann.lecun.com/exdb/mnist/ describes it. Only bytes (type 8) are read here."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

UNSIGNED_BYTE = 8


def read_idx(path: Path, *, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Read an idx file of bytes; a name that ends in .gz is unpacked. No more is read than the header announces.

    Args:
        path: the file.
        dimensions: how many it must have: 3 of images, 1 of labels.

    Raises:
        ValueError: no such file, another format, or fewer or more bytes than the header announces.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != UNSIGNED_BYTE or head[3] != dimensions:
                raise ValueError(
                    f"{path}: it begins with {head.hex() or 'nothing'}; an idx file of bytes with {dimensions} "
                    f"dimensions begins with 000008{dimensions:02x}"
                )
            sizes = file.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise ValueError(f"{path}: it ends within its header")
            shape = struct.unpack(f">{dimensions}I", sizes)
            data = _read_values(path, file, shape)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: it is damaged or cut short: {error}") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_values(path: Path, file, shape: tuple[int, ...]) -> bytes:
    """In pieces, so that a header that announces too much costs no memory."""
    count, pieces, have = math.prod(shape), [], 0
    while have < count and (piece := file.read(min(count - have, 1 << 24))):
        pieces.append(piece)
        have += len(piece)
    if have < count or file.read(1):
        came = f"{have:,}" if have < count else "more"
        raise ValueError(f"{path}: its header announces {count:,} values {list(shape)}; {came} are there")
    return b"".join(pieces)
