"""TensorFlow Datasets, read by random access and without TensorFlow."""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

from .extras import require
from .source import Source, Split, check_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFlowDatasets(Source):
    """One text feature of a prepared TFDS dataset in the ArrayRecord format.

    Reading needs no TensorFlow, preparing does: `tfds build NAME --file_format=array_record`, on any machine.

    Args:
        name: the dataset, with configuration and version as TFDS writes them ("lm1b", "wiki40b/en:1.3.0").
        data_dir: folder that holds prepared datasets; None: TFDS's own default.
        split: split for training; slices such as "train[:95%]" work too.
        validation_split: split that is held out.
        column: the feature that holds one document per example.
    """

    name: str
    data_dir: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    column: str = "text"

    def __post_init__(self) -> None:
        for field in ("name", "split", "validation_split", "column"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{field}={getattr(self, field)!r}: expected a name")

    def documents(self, split: Split) -> Sequence[str]:
        check_split(split)
        argument = "split" if split == "train" else "validation_split"
        builder = self._builder()
        if self.column not in builder.info.features:
            raise ValueError(f"column={self.column!r}: {self.name} has the features {sorted(builder.info.features)}")
        try:
            examples = builder.as_data_source(split=getattr(self, argument))
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{argument}={getattr(self, argument)!r}: {self.name}: {error}") from error
        return _Feature(examples, self.column)

    def describe(self) -> dict[str, Any]:
        builder = self._builder()
        return {
            "kind": "TensorFlowDatasets",
            "name": builder.info.full_name,
            "split": self.split,
            "validation_split": self.validation_split,
            "column": self.column,
            "documents": {name: info.num_examples for name, info in builder.info.splits.items()},
        }

    def _builder(self) -> Any:
        return prepared_builder(self.name, self.data_dir)


def prepared_builder(name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a dataset that is prepared on this machine.

    Raises:
        ValueError: TFDS does not know the dataset, or it is not prepared there.
    """
    tfds = require("tensorflow_datasets")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]  # the rest lists every dataset that TFDS knows
        raise ValueError(f"name={name!r}, data_dir={data_dir!r}: {reason}") from error
    if not builder.is_prepared():
        raise ValueError(
            f"name={name!r}, data_dir={data_dir!r}: not prepared there; "
            f"where TensorFlow is installed run: tfds build {name} --file_format=array_record"
        )
    return builder


class _Feature(Sequence[str]):
    """One feature of a random-access data source, as text."""

    def __init__(self, examples: Any, column: str):
        self._examples = examples
        self._column = column

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: there are {len(self)} documents")
        value = self._examples[index % len(self)][self._column]
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
