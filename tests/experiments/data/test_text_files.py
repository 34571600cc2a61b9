import os
from pathlib import Path

import pytest

from dynamoe.experiments.data import TextFiles


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    return tmp_path


def test_globs_find_files_in_order(folder):
    source = TextFiles(train=(f"{folder}/0*.txt",), validation=(f"{folder}/1*.txt",))
    assert source.documents("train") == [f"text {i}" for i in range(10)]
    assert source.documents("validation") == [f"text {i}" for i in range(10, 20)]


def test_one_file_in_twenty_is_held_out_by_content(folder):
    source = TextFiles(train=(f"{folder}/*.txt",))
    train, validation = source.documents("train"), source.documents("validation")
    assert len(validation) == 2 and sorted(train + validation) == sorted(f"text {i}" for i in range(40))
    for path in folder.glob("*.txt"):
        path.rename(path.with_name(f"renamed_{path.name}"))
    assert source.documents("validation") == validation


def test_single_file_gives_its_last_twentieth(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i:02}\n" for i in range(40)))
    source = TextFiles(train=(str(path),))
    assert source.documents("validation") == ["line 38\nline 39\n"]
    assert source.documents("train") == ["".join(f"line {i:02}\n" for i in range(38))]


def test_separator_makes_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|end|>".join(["one", "two\n", "three", " \n"]))
    source = TextFiles(train=(str(path),), separator="<|end|>")
    assert (source.documents("train"), source.documents("validation")) == (["one", "two\n"], ["three"])


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a").write_bytes(b"x\r\ny")
    (tmp_path / "b").write_bytes(b"z")
    source = TextFiles(train=(f"{tmp_path}/a",), validation=(f"{tmp_path}/b",))
    assert source.documents("train") == ["x\r\ny"]


def test_description_counts_and_hashes(folder):
    facts = TextFiles(train=(f"{folder}/00.txt",), validation=(f"{folder}/01.txt",)).describe()
    assert facts["train"]["documents"] == 1 and facts["train"]["bytes"] == 6
    assert facts["train"]["sha256"] != facts["validation"]["sha256"]


def test_pattern_without_files_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train: '.*nothing\*' matches no file"):
        TextFiles(train=(f"{tmp_path}/nothing*",)).documents("train")


def test_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="train: .*binary is not UTF-8 text"):
        TextFiles(train=(f"{tmp_path}/binary",)).documents("train")


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").write_text("x")

    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ValueError, match="train: cannot read .*locked .*Permission denied"):
        TextFiles(train=(f"{tmp_path}/locked",)).documents("train")


def test_file_in_both_splits_is_refused(folder):
    with pytest.raises(ValueError, match="validation=.*00.txt is also matched by train="):
        TextFiles(train=(f"{folder}/*.txt",), validation=(f"{folder}/00.txt",)).documents("train")


@pytest.mark.parametrize("wrong", [{"train": ()}, {"train": ("",)}, {"train": ("a",), "separator": ""}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        TextFiles(**wrong)


def test_a_long_line_after_a_title_is_still_split_near_its_last_twentieth(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("Title\n" + "x" * 100_000)
    source = TextFiles(train=(str(file),))
    held_out = sum(map(len, source.documents("validation")))
    assert 4_000 <= held_out <= 10_002
