"""The reader against files of the safetensors package, and against broken ones."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynamoe.models.checkpoints.tensor_files import DTYPES, Outgoing, read_header, write_file

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "bytes": np.arange(5, dtype=np.uint8),
}


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def record(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_files_of_the_safetensors_package_are_read(tmp_path):
    save_file(ARRAYS, tmp_path / "m.safetensors", {"format": "pt", "more": "ü"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"format": "pt", "more": "ü"}
    found = {entry.name: entry.read() for entry in header.entries}
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_written_files_are_read_by_the_safetensors_package(tmp_path):
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = [Outgoing(n, names[a.dtype], a.shape, lambda a=a: a) for n, a in ARRAYS.items()]
    write_file(tmp_path / "m.safetensors", tensors, {"format": "pt"})
    for name, array in load_file(tmp_path / "m.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_bfloat16_keeps_its_bits(tmp_path):
    array = np.array([1.5, -0.0, np.nan, 3e38], ml_dtypes.bfloat16)
    write_file(tmp_path / "m.safetensors", [Outgoing("x", "BF16", (4,), lambda: array)], {})
    entry = read_header(tmp_path / "m.safetensors").entries[0]
    np.testing.assert_array_equal(entry.read().view(np.uint16), array.view(np.uint16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes and states a header of 0; it is truncated"),
        (b"\x05\x00", "has 2 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", f"states a header of {2**63}; it is truncated"),
        (raw(b"{nonsense"), "the header of .* cannot be read"),
        (raw(b"\xff\xfe"), "the header of .* cannot be read"),
        (raw(b"[" * 20_000), "the header of .* cannot be read"),
        (raw(b"[]"), "is a list; it must be an object"),
        (raw(b'{"a": {}, "a": {}}'), "the name 'a' stands there twice"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__ of .* must be an object of strings"),
        (raw({"a": 3}), "'a' is described by 3; there must be dtype, shape and data_offsets"),
        (raw({"a": record(dtype="Q7")}), "'a' has dtype 'Q7'; known are F64"),
        (raw({"a": record(shape=(-1,))}, bytes(4)), r"'a' has shape \[-1\]"),
        (raw({"a": record(shape=(True,))}, bytes(4)), r"'a' has shape \[True\]"),
        (raw({"a": record(offsets=(4, 0))}, bytes(4)), r"'a' has data_offsets \[4, 0\]"),
        (raw({"a": record(shape=(2**40, 2**40))}, bytes(4)), r"'a' is F32\[.*\], which does not take the 4 bytes"),
        (raw({"a": record(shape=(10**12,), offsets=(0, 4 * 10**12))}), "header describes 4000000000.*truncated"),
        (raw({"a": record(), "b": record()}, bytes(4)), "'b' begins at byte .*; the one before ends at"),
        (raw({"a": record(offsets=(2, 6))}, bytes(6)), "neither overlap nor leave holes"),
        (raw({"a": record()}, bytes(3)), "it is truncated"),
        (raw({"a": record()}, bytes(5)), "or not what it says"),
    ],
)
def test_a_broken_file_is_refused(content, message, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "m.safetensors")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    save_file(ARRAYS, tmp_path / "m.safetensors")
    entries = read_header(tmp_path / "m.safetensors").entries
    os.truncate(tmp_path / "m.safetensors", entries[0].offset)
    with pytest.raises(OSError, match="ends within the tensor"):
        next(entry for entry in entries if entry.name == "a").read()
