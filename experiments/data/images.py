"""Images with labels: MNIST's files, folders, Hugging Face `datasets`, TensorFlow Datasets, and scikit-learn's digits,
which need no network."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .examples import Examples, ExampleSplit, LabelledSource, check_example_split, facts_of, parts
from .extras import require
from .idx_files import read_idx
from .tensorflow_datasets import prepared_builder

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(LabelledSource):
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: Alpaydin and Kaynak 1998,
    https://doi.org/10.24432/C50P49. 300 of them are for validation and 300 for the test, drawn at random."""

    seed: int = 0
    """Of the draw."""

    def examples(self, split: ExampleSplit) -> Examples:
        check_example_split(split)
        found = require("sklearn.datasets").load_digits()
        images = np.round(found.images[..., None] * (255 / 16)).astype(np.uint8)
        whole = Examples(images, found.target.astype(np.int32))
        return dict(zip(("train", "validation", "test"), parts(whole, (300, 300), self.seed), strict=True))[split]

    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(10)))

    def describe(self) -> dict[str, Any]:
        return _described(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistFiles(LabelledSource):
    """A folder with MNIST's four idx files, or those of a data set in its format (Fashion-MNIST, KMNIST): LeCun et al.
    1998, https://doi.org/10.1109/5.726791. The last training images are for validation."""

    folder: Path
    """With train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they
    are or with .gz."""
    validation: int = 5000
    """How many of the training images are for validation."""
    classes: int = 10
    """Labels go from 0 to one less."""

    def __post_init__(self):
        for name, least in (("validation", 1), ("classes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"MnistFiles.{name} is {getattr(self, name)}; it must be at least {least}")

    def examples(self, split: ExampleSplit) -> Examples:
        check_example_split(split)
        found = self._read("t10k" if split == "test" else "train")
        if split == "test":
            return found
        if self.validation >= len(found.labels):
            raise ValueError(
                f"MnistFiles.validation is {self.validation}; {self.folder} has {len(found.labels)} training images"
            )
        chosen = slice(-self.validation) if split == "train" else slice(-self.validation, None)
        return Examples(found.inputs[chosen], found.labels[chosen])

    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    def describe(self) -> dict[str, Any]:
        return _described(self)

    def _read(self, part: str) -> Examples:
        files = [self._file(f"{part}-images-idx3-ubyte"), self._file(f"{part}-labels-idx1-ubyte")]
        images, labels = (read_idx(file, dimensions=count) for file, count in zip(files, (3, 1), strict=True))
        if len(images) != len(labels):
            raise ValueError(f"{files[0]} has {len(images):,} images and {files[1]} {len(labels):,} labels")
        if labels.size and labels.max() >= self.classes:
            raise ValueError(f"{files[1]}: there is a label {labels.max()}; allowed are 0 to {self.classes - 1}")
        return Examples(images[..., None], labels.astype(np.int32))

    def _file(self, name: str) -> Path:
        for file in (self.folder / name, self.folder / f"{name}.gz"):
            if file.is_file():
                return file
        raise ValueError(f"MnistFiles.folder is {self.folder}; there is neither {name} nor {name}.gz in it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolders(LabelledSource):
    """A folder of images for each class, in train/, validation/ and test/. All images are read at once, brought to one
    size and to gray or colours."""

    folder: Path
    """With train/, validation/ and test/, and in each of them one folder a class."""
    size: tuple[int, int]
    """Height and width in pixels; images of another size are scaled."""
    channels: int = 3
    """1: gray; 3: red, green, blue."""

    def __post_init__(self):
        if min(self.size) < 1:
            raise ValueError(f"ImageFolders.size is {self.size}; both must be at least 1 pixel")
        _check_channels(self)

    def examples(self, split: ExampleSplit) -> Examples:
        check_example_split(split)
        names = self.class_names()
        strange = [each.name for each in _folders(self.folder / split) if each.name not in names]
        if strange:
            raise ValueError(f"{self.folder / split}: it has the classes {strange[:5]}, which train/ has not")
        files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((self.folder / split / name).glob("*"))
            if file.suffix.lower() in IMAGE_FILES
        ]
        if not files:
            raise ValueError(f"{self.folder / split}: there is no image in its classes' folders ({', '.join(names)})")
        image = require("PIL.Image")

        def pixels(file: Path) -> np.ndarray:
            try:
                with image.open(file) as opened:
                    return as_pixels(opened, self.size, self.channels)
            except (OSError, image.DecompressionBombError) as error:
                raise ValueError(f"{file}: it cannot be read as an image: {error}") from error

        return Examples(
            np.stack([pixels(file) for file, _ in files]), np.array([label for _, label in files], np.int32)
        )

    def class_names(self) -> tuple[str, ...]:
        names = tuple(each.name for each in _folders(self.folder / "train"))
        if len(names) < 2:
            raise ValueError(f"{self.folder / 'train'}: it has {len(names)} folders; a class each, two at least")
        return names

    def describe(self) -> dict[str, Any]:
        return _described(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceImages(LabelledSource):
    """Images of a dataset that `datasets.load_dataset` opens, all held in memory."""

    path: str
    """Name on the hub, or a local folder."""
    size: tuple[int, int]
    """Height and width in pixels; images of another size are scaled."""
    channels: int = 3
    """1: gray; 3: red, green, blue."""
    name: str | None = None
    """The dataset's configuration."""
    revision: str | None = None
    """Commit or tag on the hub, to record exactly what was read."""
    train: str = "train"
    """Split, or slice such as "train[:95%]"."""
    validation: str = "validation"
    test: str = "test"
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self):
        _check_channels(self)

    def examples(self, split: ExampleSplit) -> Examples:
        rows = self._load(split)
        images = (as_pixels(each, self.size, self.channels) for each in rows[self.image_column])
        return _collected(str(self), images, rows[self.label_column], len(self.class_names()))

    def class_names(self) -> tuple[str, ...]:
        feature = self._load("train").features[self.label_column]
        if not hasattr(feature, "names"):
            raise ValueError(
                f"label_column={self.label_column!r}: {self} holds {feature} there; it must be a ClassLabel"
            )
        return tuple(feature.names)

    def describe(self) -> dict[str, Any]:
        return _described(self) | {"fingerprint": self._load("train")._fingerprint}

    def _load(self, split: ExampleSplit) -> Any:
        check_example_split(split)
        datasets = require("datasets")
        try:
            rows = datasets.load_dataset(self.path, self.name, split=getattr(self, split), revision=self.revision)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{self}, {split}={getattr(self, split)!r} cannot be loaded: {error}") from error
        for column in (self.image_column, self.label_column):
            if column not in rows.column_names:
                raise ValueError(f"column {column!r}: {self} has the columns {sorted(rows.column_names)}")
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFlowImages(LabelledSource):
    """Images of a prepared TFDS dataset in the ArrayRecord format, all held in memory; reading needs no TensorFlow."""

    name: str
    """The dataset, such as "mnist" or "cifar10"."""
    data_dir: str | None = None
    """Folder that holds prepared datasets; None: TFDS's own default."""
    train: str = "train[:95%]"
    """Split, or a slice of one."""
    validation: str = "train[95%:]"
    test: str = "test"
    image_column: str = "image"
    label_column: str = "label"

    def examples(self, split: ExampleSplit) -> Examples:
        check_example_split(split)
        builder = prepared_builder(self.name, self.data_dir)
        for column in (self.image_column, self.label_column):
            if column not in builder.info.features:
                raise ValueError(f"column {column!r}: {self.name} has the features {sorted(builder.info.features)}")
        try:
            rows = builder.as_data_source(split=getattr(self, split))
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{split}={getattr(self, split)!r}: {self.name}: {error}") from error
        images = [np.asarray(row[self.image_column], np.uint8) for row in rows]
        return _collected(self.name, images, [row[self.label_column] for row in rows], len(self.class_names()))

    def class_names(self) -> tuple[str, ...]:
        return tuple(prepared_builder(self.name, self.data_dir).info.features[self.label_column].names)

    def describe(self) -> dict[str, Any]:
        return _described(self)


def as_pixels(image: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """A Pillow image as uint8 [height, width, channels]."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), require("PIL.Image").Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(*size, channels)


def _collected(name: str, images: Iterable[np.ndarray], labels: Any, classes: int) -> Examples:
    stacked, found = list(images), np.asarray(labels, np.int32)
    if len({each.shape for each in stacked}) != 1:
        raise ValueError(f"{name}: its images have {len({each.shape for each in stacked})} sizes; all must have one")
    if found.min() < 0 or found.max() >= classes:
        raise ValueError(f"{name}: it has labels from {found.min()} to {found.max()}; allowed are 0 to {classes - 1}")
    return Examples(np.stack(stacked), found)


def _check_channels(source: Any) -> None:
    if source.channels not in (1, 3):
        raise ValueError(f"{type(source).__name__}.channels is {source.channels}; allowed are 1 (gray) and 3 (colours)")


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    return sorted(each for each in path.iterdir() if each.is_dir())


def _described(source: Any) -> dict[str, Any]:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    return {"kind": type(source).__name__, **fields, "train": facts_of(source.examples("train"))}
