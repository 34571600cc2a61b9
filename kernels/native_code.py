"""C++ of this package as operations of XLA on CPU, compiled on the machine that runs it.

A source file uses XLA's own header for foreign functions, which jaxlib ships, so it needs no mirror of XLA's structures
and follows its version. Compiled for the very CPU, a product runs at the speed of a vendor's library; the library
stays in the user's cache directory, so only the first process waits (some 10 seconds).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

CACHE = "DYNAMOE_CACHE"
"""The environment variable that names the cache directory; by default `~/.cache/dynamoe`, as XDG has it."""
COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order, where the environment variable CXX names none."""


def compiled_library(source: Path, **macros: str) -> ctypes.CDLL:
    """The shared library of a C++ source file with these macros defined, compiled unless the cache has it.

    Its name in the cache holds a digest of all that it depends on: the source and the headers beside it, compiler and
    options, jaxlib and the CPU's features. Processes may compile it at the same time: each writes a file of its own and
    renames it.

    Raises:
        OSError: there is no compiler, or it failed, or what it wrote cannot be loaded. Says what the compiler said.
    """
    definitions = [f"-D{name}={value}" for name, value in macros.items()]
    command = [_compiler(), *_options(), *definitions, "-isystem", jax.ffi.include_dir()]
    compiler = _run([command[0], "--version"])
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*texts, compiler, *command, version("jaxlib"), _cpu())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    folder = _cache()
    library = folder / f"{source.stem}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            fresh = Path(own, library.name)
            _run([*command, str(source), "-o", str(fresh)])
            fresh.replace(library)
    return ctypes.CDLL(str(library))


def register(library: ctypes.CDLL, symbol: str, target: str) -> None:
    """Let XLA on CPU call the handler `symbol` of a library by the name `target`, as `jax.ffi.ffi_call` takes it."""
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise OSError(f"there is no C++ compiler: none of {', '.join(names)} is on PATH")


def _options() -> tuple[str, ...]:
    # Clang on Arm knows the machine's own CPU by -mcpu.
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return "-std=c++17", "-O3", native, "-w", "-shared", "-fPIC", "-pthread"


@functools.cache
def _cpu() -> str:
    """The features that "native" stands for: a home directory may be shared by machines of different CPUs."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line
    return f"{sys.platform} {platform.machine()} {platform.processor()}"


def _cache() -> Path:
    base = os.environ.get(CACHE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) if base else Path(home, "dynamoe")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout
