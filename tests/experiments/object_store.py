"""An object store without network, for `gs://` through epath: keys and whole objects, and nothing that a store lacks.

Objects lie as files in a folder, so that other processes see them. There is no rename, no appending and no empty
folder; an object appears when its writer closes it.
"""

import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec

FOLDER = "DYNAMOE_TEST_STORE"
"""The environment variable that names the folder."""


class ObjectStore(fsspec.AbstractFileSystem):
    """Stands in for gcsfs."""

    protocol = ("gcs", "gs")
    cachable = False
    refusing = False
    """Whether it answers no more: the machine was killed, or has lost the network."""

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        prefix = f"{self._strip_protocol(path)}/"
        below = [key for key in self._keys() if key.startswith(prefix)]
        if not below and prefix[:-1] not in self._keys():
            raise FileNotFoundError(path)
        entries = {}
        for key in below or [prefix[:-1]]:
            child, _, rest = key.removeprefix(prefix).partition("/")
            name = f"{prefix}{child}" if below else key
            kind, size = ("directory", 0) if rest else ("file", self._file(key).stat().st_size)
            entries[name] = {"name": name, "size": size, "type": kind}
        return list(entries.values()) if detail else list(entries)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = self._strip_protocol(path)
        if self._file(key).is_file():
            return {"name": key, "size": self._file(key).stat().st_size, "type": "file"}
        if any(other.startswith(f"{key}/") for other in self._keys()):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def exists(self, path: str, **_: Any) -> bool:
        """As gcsfs: an error is none of "no such object"."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        file = self._file(self._strip_protocol(path))
        if mode == "rb":
            return io.BytesIO(file.read_bytes())
        assert mode == "wb", f"a store cannot open for {mode}"
        return _Upload(file)

    def rm_file(self, path: str) -> None:
        self._file(self._strip_protocol(path)).unlink()

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise AssertionError("a run must not count on copying or renaming")

    def _file(self, key: str) -> Path:
        if ObjectStore.refusing:
            raise OSError("the store does not answer")
        return Path(os.environ[FOLDER]) / quote(key, safe="")

    def _keys(self) -> list[str]:
        return sorted(unquote(file.name) for file in Path(os.environ[FOLDER]).iterdir() if file.suffix != ".part")


class _Upload(io.BytesIO):
    def __init__(self, file: Path):
        super().__init__()
        self._target = file

    def close(self) -> None:
        if not self.closed:
            part = self._target.with_name(f"{self._target.name}.{os.getpid()}.part")
            part.write_bytes(self.getvalue())
            part.replace(self._target)
        super().close()
