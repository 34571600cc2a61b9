"""Hugging Face `datasets`: from the hub or from local files, whole or streamed."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .extras import require
from .source import Completion, Document, Source, Split, check_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """One text column of a dataset that `datasets.load_dataset` opens.

    Args:
        path: hub name, local folder, or a format ("json", "parquet", "text") with `data_files`.
        name: the dataset's configuration.
        split: split for training; without streaming, slices such as "train[:95%]" work too.
        validation_split: split that is held out.
        column: the column that holds one document per row.
        streaming: read rows in order, without preparing the dataset on this machine.
        data_files: split name to path or paths; kept as pairs, so that the configuration can be stored.
        prompt_column: the column of what `column` answers, where the answers alone are learned; None: texts.
        revision: commit or tag on the hub, to record exactly what was read.
    """

    path: str
    name: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    column: str = "text"
    streaming: bool = False
    data_files: tuple[tuple[str, tuple[str, ...]], ...] | Mapping[str, str | tuple[str, ...]] | None = None
    revision: str | None = None
    prompt_column: str | None = None

    def __post_init__(self) -> None:
        for field in ("path", "split", "validation_split", "column"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{field}={getattr(self, field)!r}: expected a name")
        if self.streaming and ("[" in self.split or "[" in self.validation_split):
            raise ValueError(
                f"split={self.split!r}, validation_split={self.validation_split!r}: "
                "a slice needs streaming=False; with streaming=True name whole splits"
            )
        if self.streaming and self.prompt_column is not None:
            raise ValueError(f"prompt_column={self.prompt_column!r}: prompts with completions need streaming=False")
        if isinstance(self.data_files, Mapping):
            files = self.data_files.items()
            pairs = tuple((split, (paths,) if isinstance(paths, str) else tuple(paths)) for split, paths in files)
            object.__setattr__(self, "data_files", pairs)

    @property
    def streams(self) -> bool:
        return self.streaming

    def documents(self, split: Split) -> Iterable[Document]:
        if self.streaming:
            return (document for document, _ in self.stream(split))
        loaded = self._load(split)
        if self.prompt_column is None:
            return loaded[self.column]
        pairs = list(map(Completion, loaded[self.prompt_column], loaded[self.column]))
        for number, pair in enumerate(pairs):
            if not (isinstance(pair.prompt, str) and isinstance(pair.completion, str) and pair.completion):
                raise ValueError(f"row {number} of {self} is {pair}; expected two texts, the second not empty")
        return pairs

    def stream(self, split: Split, state: Any = None) -> Iterator[tuple[Document, Any]]:
        if not self.streaming:
            return super().stream(split, state)
        return self._stream(self._load(split).select_columns([self.column]), state)

    def _stream(self, rows: Any, state: Any) -> Iterator[tuple[str, Any]]:
        if state is not None:
            rows.load_state_dict(state)
        for row in rows:
            yield row[self.column], rows.state_dict()

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"kind": "HuggingFace", "datasets": require("datasets").__version__}
        facts |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        facts["data_files"] = self._files()
        if not self.streaming:
            loaded = self._load("train")
            facts |= {"documents": len(loaded), "fingerprint": loaded._fingerprint}
        return facts

    def _files(self) -> dict[str, list[str]] | None:
        if self.data_files is None:
            return None
        return {split: list(paths) for split, paths in dict(self.data_files).items()}

    def _load(self, split: Split) -> Any:
        check_split(split)
        datasets = require("datasets")
        argument = "split" if split == "train" else "validation_split"
        asked = f"HuggingFace(path={self.path!r}, name={self.name!r}, {argument}={getattr(self, argument)!r})"
        try:
            loaded = datasets.load_dataset(
                self.path,
                self.name,
                split=getattr(self, argument),
                streaming=self.streaming,
                data_files=self._files(),
                revision=self.revision,
            )
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{asked} cannot be loaded: {error}") from error
        columns = loaded.column_names
        for argument in ("column", "prompt_column"):
            wanted = getattr(self, argument)
            if columns is not None and wanted is not None and wanted not in columns:
                raise ValueError(f"{argument}={wanted!r}: {asked} has the columns {sorted(columns)}")
        return loaded
