"""Labelled examples: MNIST's files and damaged ones, folders, tables of texts, datasets, splits and batches."""

import dataclasses
import gzip
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dynamoe.experiments.data import Bytes
from dynamoe.experiments.data import images as images_module
from dynamoe.experiments.data.examples import (
    NOBODY,
    Examples,
    calibration_half,
    choosing_half,
    evaluation_batches,
    parts,
)
from dynamoe.experiments.data.idx_files import read_idx
from dynamoe.experiments.data.images import Digits, HuggingFaceImages, ImageFolders, MnistFiles, TensorFlowImages
from dynamoe.experiments.data.labelled_text import HuggingFaceText, LabelledFiles, Words
from dynamoe.experiments.data.pipeline import shuffled_examples

PIXELS = np.arange(7 * 3 * 2, dtype=np.uint8).reshape(7, 3, 2)
LABELS = np.array([0, 1, 2, 3, 0, 1, 2], np.uint8)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An idx file of an array."""
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Seven training and seven test images, half of the files packed."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[::-1]))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[::-1])))
    return tmp_path


def test_mnist_files_are_read_and_split(mnist: Path) -> None:
    source = MnistFiles(folder=mnist, validation=2, classes=4)
    train, validation, test = (source.examples(split) for split in ("train", "validation", "test"))
    np.testing.assert_array_equal(np.concatenate([train.inputs, validation.inputs])[..., 0], PIXELS)
    np.testing.assert_array_equal(test.inputs[..., 0], PIXELS[::-1])
    np.testing.assert_array_equal(validation.labels, [1, 2])
    assert train.labels.dtype == np.int32 and source.class_names() == ("0", "1", "2", "3")
    assert source.describe()["train"]["examples"] == 5 and json.dumps(source.describe(), default=str)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it begins with nothing; an idx file of bytes with 3 dimensions begins with 00000803"),
        (lambda data: b"PNG" + data, "it begins with 504e4700; an idx file of bytes"),
        (lambda data: idx(LABELS), "it begins with 00000801; an idx file of bytes with 3 dimensions"),
        (lambda data: idx(PIXELS, kind=13), "it begins with 00000d03"),
        (lambda data: data[:9], "it ends within its header"),
        (lambda data: data[:-1], r"its header announces 42 values \[7, 3, 2\]; 41 are there"),
        (lambda data: data + b"x", r"its header announces 42 values \[7, 3, 2\]; more are there"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "its header announces .* values .*; 42 are there"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_idx_file_is_named_with_what_is_wrong(damage, message, packed, tmp_path: Path) -> None:
    file = tmp_path / ("images.gz" if packed else "images")
    data = damage(idx(PIXELS))
    file.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        read_idx(file, dimensions=3)


def test_a_packed_file_that_is_cut_short_or_no_gzip_is_named(tmp_path: Path) -> None:
    file = tmp_path / "images.gz"
    for data in (gzip.compress(idx(PIXELS))[:-12], b"plain bytes", gzip.compress(idx(PIXELS))[:30] + b"\0" * 40):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{file}: it is damaged or cut short"):
            read_idx(file, dimensions=3)


def test_mnist_files_that_do_not_belong_together_are_refused(mnist: Path) -> None:
    with pytest.raises(ValueError, match="MnistFiles.validation is 7; .* has 7 training images"):
        MnistFiles(folder=mnist, validation=7, classes=4).examples("train")
    with pytest.raises(ValueError, match="there is a label 3; allowed are 0 to 2"):
        MnistFiles(folder=mnist, validation=2, classes=3).examples("train")
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    with pytest.raises(ValueError, match="has 7 images and .* 4 labels"):
        MnistFiles(folder=mnist, validation=2, classes=4).examples("train")
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="there is neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz"):
        MnistFiles(folder=mnist, validation=2, classes=4).examples("train")


def test_an_unknown_split_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="split='dev': allowed are 'train', 'validation', 'test'"):
        Digits().examples("dev")  # pyright: ignore[reportArgumentType]


def test_digits_are_those_of_scikit_learn_each_in_one_split() -> None:
    splits = [Digits().examples(split) for split in ("train", "validation", "test")]
    assert [len(each.labels) for each in splits] == [1197, 300, 300]
    found = np.concatenate([each.inputs for each in splits]).reshape(1797, 64).astype(np.float64)
    assert sorted(map(tuple, np.round(found * 16 / 255))) == sorted(map(tuple, load_digits().data))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A red and a green image of each split, of two sizes."""
    for split in ("train", "validation", "test"):
        for name, colour in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 2), colour).save(folder / "a.png")
            Image.new("RGB", (8, 4), colour).save(folder / "b.png")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_image_folders_are_brought_to_one_size(folders: Path) -> None:
    source = ImageFolders(folder=folders, size=(2, 4))
    train = source.examples("train")
    assert train.inputs.shape == (4, 2, 4, 3) and source.class_names() == ("green", "red")
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(train.inputs[2:, ..., 0], 200)
    assert ImageFolders(folder=folders, size=(2, 4), channels=1).examples("test").inputs.shape == (4, 2, 4, 1)
    (folders / "test" / "blue").mkdir()
    with pytest.raises(ValueError, match=r"it has the classes \['blue'\], which train/ has not"):
        source.examples("test")
    (folders / "train" / "red" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png: it cannot be read as an image"):
        source.examples("train")
    with pytest.raises(ValueError, match="ImageFolders.channels is 2; allowed are 1"):
        ImageFolders(folder=folders, size=(2, 4), channels=2)


def test_a_hugging_face_dataset_gives_the_same_images(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    source = HuggingFaceImages(path=str(folders), size=(2, 4))
    found, expected = source.examples("train"), ImageFolders(folder=folders, size=(2, 4)).examples("train")
    np.testing.assert_array_equal(found.inputs, expected.inputs)
    np.testing.assert_array_equal(found.labels, expected.labels)
    with pytest.raises(ValueError, match=r"column 'picture': .* has the columns \['image', 'label'\]"):
        dataclasses.replace(source, image_column="picture").examples("train")


def test_tensorflow_images_come_from_a_prepared_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": PIXELS[i][..., None], "label": i % 2} for i in range(4)]
    info = SimpleNamespace(features={"image": None, "label": SimpleNamespace(names=["even", "odd"])})
    builder = SimpleNamespace(info=info, as_data_source=lambda split: rows)
    monkeypatch.setattr(images_module, "prepared_builder", lambda name, data_dir: builder)
    found = TensorFlowImages(name="pixels").examples("train")
    np.testing.assert_array_equal(found.inputs[..., 0], PIXELS[:4])
    np.testing.assert_array_equal(found.labels, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="column 'picture': pixels has the features"):
        TensorFlowImages(name="pixels", image_column="picture").examples("train")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The same rows as .tsv, .csv and .jsonl."""
    rows = [('a "good" film', 1), ("a bad film", 0), ("Good good bad", 1)]
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    quoted = [(text.replace('"', '""'), label) for text, label in rows]
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "".join(f'"{text}",{label}\n' for text, label in quoted))
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def of_files(file: Path, **options) -> LabelledFiles:
    return LabelledFiles(train=file, validation=file, test=file, **options)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_tables_become_padded_ids_of_the_most_frequent_words(tables: Path, suffix: str) -> None:
    source = of_files(tables / f"rows.{suffix}", length=4, tokens=Words(size=5))
    # a, bad, film and good appear twice, and "good" with its marks is another word; alphabetical among equals
    found = source.examples("train")
    np.testing.assert_array_equal(found.inputs, [[1, 0, 3, -1], [1, 2, 3, -1], [4, 4, 2, -1]])
    np.testing.assert_array_equal(found.labels, [1, 0, 1])
    assert source.vocabulary == 5 and source.class_names() == ("0", "1")
    short = of_files(tables / f"rows.{suffix}", length=2, tokens=Bytes()).examples("test")
    np.testing.assert_array_equal(short.inputs[1], Bytes().encode("a "))


def test_a_hugging_face_table_gives_the_same_texts(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tables / "cache"))
    folder = tables / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text((tables / "rows.jsonl").read_text())
    options = {"length": 4, "tokens": Words(size=5), "train": "train", "validation": "train", "test": "train"}
    found = HuggingFaceText(path=str(folder), **options).examples("train")
    expected = of_files(tables / "rows.tsv", length=4, tokens=Words(size=5)).examples("train")
    np.testing.assert_array_equal(found.inputs, expected.inputs)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.tsv", "sentence\tlabel\ngood\t2\n", "x.tsv, row 1: its label is '2'; allowed are"),
        ("x.tsv", "sentence\tlabel\n", "x.tsv: there is no row in it"),
        ("x.tsv", "text\tlabel\ngood\t1\n", r"x.tsv, row 1: it has \['label', 'text'\]"),
        ("x.jsonl", "{]\n", "x.jsonl, line 1: it is no JSON"),
        ("x.jsonl", "[1]\n", r"x.jsonl, line 1: it is \[1\]; it must be an object"),
        ("x.txt", "good\n", "its name must end in .tsv, .csv or .jsonl"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        of_files(tmp_path / name).examples("train")


def test_options_of_texts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LabelledFiles.train is .*; there is no such file"):
        of_files(tmp_path / "gone.tsv").examples("train")
    with pytest.raises(ValueError, match=r"LabelledFiles.labels is \('0', '0'\)"):
        of_files(tmp_path / "x.tsv", labels=("0", "0"))
    with pytest.raises(ValueError, match="Words.size is 1"):
        Words(size=1)


NUMBERED = Examples(np.arange(10, dtype=np.int32)[:, None], np.arange(10, dtype=np.int32))


def test_batches_go_round_in_new_orders_and_continue_where_they_stood() -> None:
    batches = shuffled_examples(NUMBERED, batch_size=5, seed=3)
    rounds = [np.concatenate([next(batches).labels, next(batches).labels]) for _ in range(2)]
    assert all(sorted(each) == list(range(10)) for each in rounds) and not np.array_equal(*rounds)
    state = batches.get_state()
    expected = next(batches)
    again = shuffled_examples(NUMBERED, batch_size=5, seed=3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again).labels, expected.labels)
    mine = shuffled_examples(NUMBERED, batch_size=5, seed=3, rows=[1, 4])
    np.testing.assert_array_equal(next(mine).labels, rounds[0][[1, 4]])
    with pytest.raises(ValueError, match="batch_size=11: allowed are 1 to the number of training examples, 10"):
        shuffled_examples(NUMBERED, batch_size=11, seed=0)


def test_evaluation_sees_each_example_once_and_halves_share_none() -> None:
    found = evaluation_batches(NUMBERED, 4)
    assert [each.labels.tolist() for each in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, NOBODY, NOBODY]]
    assert found[2].inputs[:, 0].tolist() == [8, 9, 8, 8]
    halves = [half(NUMBERED).labels.tolist() for half in (choosing_half, calibration_half)]
    assert sorted(halves[0] + halves[1]) == list(range(10))
    with pytest.raises(ValueError, match=r"there are 10 examples; \[6, 4\] of them are held out, none is left"):
        parts(NUMBERED, (6, 4), 0)
