"""Where a run lies: a directory that this machine mounts, or a folder of an object store, `gs://bucket/run`.

Local paths stay `pathlib.Path`; an address is an `etils.epath.Path`, because pathlib makes one slash of two.
"""

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

Place = Path | epath.Path
"""A directory or file, local or remote. Both kinds have the methods of pathlib that runs need."""

PACKAGES = {"gs": ("gcsfs", "google.cloud.storage")}
"""What a scheme needs: epath reads and writes files through the first, Orbax looks at the bucket through the second.
The arrays themselves go through TensorStore's own driver."""


def parse_place(text: str) -> Place:
    """A path as it was typed. Nothing is checked: see `check_place`."""
    return epath.Path(text) if re.match(r"(gs|s3|az|hf)://", text) else Path(text)


def is_remote(place: Place) -> bool:
    """Whether it lies in an object store: no rename, no appending, no lock of the system, a file is written whole."""
    return "://" in str(place)


def check_place(place: Place) -> Place:
    """The directory of a run, absolute, after a check that this machine can use such a place.

    Raises:
      ValueError: an address with one slash, or a store that cannot hold a run.
      ImportError: a package is missing; the message says what installs it.
    """
    if one_slash := re.match(r"([a-z][a-z0-9]+):/(?!/)", str(place)):
        scheme = one_slash[1]
        fix = f'give {scheme}://…, and in Python etils.epath.Path("{scheme}://…"), for pathlib makes one slash of two'
        raise ValueError(
            f"run directory {place}: {fix if scheme in PACKAGES else 'of addresses, gs://BUCKET/RUN alone is allowed'}"
        )
    if not is_remote(place):
        return Path(place).absolute()
    scheme, rest = str(place).split("://", 1)
    if scheme not in PACKAGES:
        raise ValueError(
            f"run directory {place}: Orbax cannot save checkpoints to {scheme}://; give gs://BUCKET/RUN, or a "
            "directory of a file system that all machines mount"
        )
    if not all(rest.rstrip("/").partition("/")):
        raise ValueError(f"run directory {place}: give a folder in a bucket, gs://BUCKET/RUN")
    for package in PACKAGES[scheme]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"run directory {place}: the package {package} is needed for {scheme}:// and cannot be imported "
                f'({error}): pip install "dynamoe[remote]"'
            ) from error
    return place


@contextlib.contextmanager
def store_errors(place: Place) -> Iterator[None]:
    """Tells what a store answers in one line: each client has errors of its own, and some say an address alone.

    Raises:
      ValueError: a store refused, or did not answer.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if not is_remote(place):
            raise
        raise ValueError(
            f"run directory {place}: the store refused ({type(error).__name__}: {error}); look at the bucket's name "
            "and at the credentials (gcloud auth application-default login, or the machine's service account)"
        ) from error


def absolute(place: Place) -> Place:
    """The place from the root of the file system; an address is one already."""
    return place if is_remote(place) else Path(place).absolute()


@contextlib.contextmanager
def local_folder(target: Place) -> Iterator[Path]:
    """The folder `target` itself; of a remote one a stand-in, whose files are uploaded when the block ends.

    For libraries that write only where this machine mounts.
    """
    if not is_remote(target):
        yield Path(target)
        return
    with tempfile.TemporaryDirectory(prefix="dynamoe-") as folder:
        try:
            yield Path(folder)
        finally:
            upload(Path(folder), target)


def upload(folder: Path, target: Place) -> None:
    """Writes every file below a local folder to the same place below `target`, each whole."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (target / os.fspath(file.relative_to(folder))).write_bytes(file.read_bytes())
