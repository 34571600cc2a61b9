"""A Python function as an operation of XLA on CPU, through XLA's foreign function interface and `ctypes`.

XLA calls a C function with a pointer to a call frame, where it finds the addresses of arguments and results: they are
read and written in place, without the copies and the scheduling of `jax.pure_callback`. The structures below mirror
`xla/ffi/api/c_api.h`, which jaxlib ships. A mirror is true of the versions that it was held against, so any other
version is refused before one of its structures is read.
"""

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

VERSIONS = (3, 5)
"""Minor versions of the interface that were tried, of major version 0: those of jaxlib 0.10.2 and 0.12.0.1."""
METADATA_EXTENSION, EXECUTE, INTERNAL_ERROR = 1, 3, 13
DTYPES = {4: np.dtype(np.int32), 11: np.dtype(np.float32)}

Function = Callable[[list[np.ndarray], list[np.ndarray]], None]
"""Reads the arguments and writes the results: views of XLA's memory that end with the call. May run on several threads
at once; what it raises becomes the error of the computation."""


class _Base(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]


class _Version(_Base):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Api(_Base):
    _fields_ = [("version", _Version), ("internal", ctypes.c_void_p), ("create_error", ctypes.c_void_p)]


class _Error(_Base):
    _fields_ = [("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _Buffer(_Base):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]


class _Buffers(_Base):
    """Arguments, or results."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]


class _Attributes(_Base):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
    ]


class _Frame(_Base):
    _fields_ = [
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
        ("future", ctypes.c_void_p),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
        ("state_type", ctypes.c_int64),
    ]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


_FRAME_SIZE = _Frame.future.offset  # The interface leaves `future` out of the size, and the padding of `traits`.
_METADATA_SIZE = _Metadata.traits.offset + ctypes.sizeof(ctypes.c_uint32)
_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
_CREATE_ERROR = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error))
_functions: dict[str, Function] = {}
_handlers: list[object] = []  # XLA keeps bare addresses of them: they must outlive every executable.
_lock = threading.Lock()


def register(name: str, function: Function) -> None:
    """Let `jax.ffi.ffi_call(name, ...)` call the function on CPU. Arrays are float32 or int32, and row-major.

    XLA takes a name once; after that, another function takes the place of the first.

    Raises:
        NotImplementedError: this jaxlib speaks a version of the interface that was not tried.
    """
    version = installed_version()
    if version not in VERSIONS:
        tried = " and ".join(f"0.{minor}" for minor in VERSIONS)
        spoken = "none that can be read" if version is None else f"0.{version}"
        raise NotImplementedError(f"this jaxlib's foreign function interface is {spoken}; tried were {tried}")
    with _lock:
        known = name in _functions
        _functions[name] = function
        if not known:
            handler = _HANDLER(functools.partial(_handle, name, version))
            _handlers.append(handler)
            capsule = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value)
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def installed_version() -> int | None:
    """The minor version in the header of the installed jaxlib; None where that cannot be read, or major is not 0."""
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)$", header, re.MULTILINE))
    return int(found["MINOR"]) if found.get("MAJOR") == "0" and "MINOR" in found else None


def _handle(name: str, version: int, pointer) -> int | None:
    """What XLA calls. Returns the address of an error, or None."""
    frame = pointer.contents
    try:
        if frame.struct_size != _FRAME_SIZE:
            raise NotImplementedError(f"XLA's call frame has {frame.struct_size} bytes; expected are {_FRAME_SIZE}")
        spoken = frame.api.contents.version
        if (spoken.major, spoken.minor) != (0, version):
            raise NotImplementedError(f"XLA speaks {spoken.major}.{spoken.minor}; its header says 0.{version}")
        if frame.extension:
            _tell_version(frame.extension, version)
        elif frame.stage == EXECUTE:
            _functions[name](_views(frame.arguments), _views(frame.results))
    except BaseException as error:  # Nothing may leave a C callback: XLA would take it for success.
        return _report(frame.api, f"{type(error).__name__}: {error}")
    return None


def _tell_version(address: int, version: int) -> None:
    """Answer XLA's question, asked when a target is registered, for which version it was written."""
    extension = _Extension.from_address(address)
    if extension.type != METADATA_EXTENSION or extension.struct_size != ctypes.sizeof(_Extension):
        raise NotImplementedError(f"XLA's call frame has an unknown extension, type {extension.type}")
    metadata = extension.metadata.contents
    if metadata.struct_size != _METADATA_SIZE:
        raise NotImplementedError(f"XLA's metadata have {metadata.struct_size} bytes; expected are {_METADATA_SIZE}")
    metadata.version = _Version(ctypes.sizeof(_Version), None, 0, version)
    metadata.traits = metadata.state_type = 0


def _views(buffers: _Buffers) -> list[np.ndarray]:
    views = []
    for i in range(buffers.size):
        buffer = buffers.buffers[i].contents
        if buffer.struct_size != ctypes.sizeof(_Buffer) or buffer.dtype not in DTYPES:
            raise NotImplementedError(f"a buffer has {buffer.struct_size} bytes of description, dtype {buffer.dtype}")
        shape, dtype = tuple(buffer.dims[: buffer.rank]), DTYPES[buffer.dtype]
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            views.append(np.empty(shape, dtype))
            continue
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(buffer.data)
        views.append(np.ndarray(shape, dtype, memory))
    return views


def _report(api, message: str) -> int | None:
    # The place of this function has been the same in every version with major 0, so it may be called whatever failed.
    create = _CREATE_ERROR(api.contents.create_error)
    text = message.encode().replace(b"\0", b"")
    return create(_Error(ctypes.sizeof(_Error) - 4, None, text, INTERNAL_ERROR))
