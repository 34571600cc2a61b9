import json
import platform
import sysconfig
from pathlib import Path

import pytest

from dynamoe.experiments.data import StandardLibrary
from dynamoe.experiments.data.source import check_split
from dynamoe.experiments.data.standard_library import read_tree


def write(root, names, content="x = 1\n"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + f"# {name}\n")


@pytest.fixture(scope="module")
def splits():
    source = StandardLibrary()
    return source.documents("train"), source.documents("validation")


def test_splits_are_disjoint_and_hold_known_files(splits):
    train, validation = splits
    assert not set(filter(None, train)) & set(filter(None, validation))
    text = (Path(sysconfig.get_path("stdlib")) / "dataclasses.py").read_bytes().decode()
    assert (text in train) != (text in validation)


def test_about_one_file_in_twenty_is_held_out(splits):
    train, validation = splits
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.09
    assert sum(map(len, train)) > 5_000_000


def test_splits_are_the_same_every_time_and_recorded(splits):
    train, validation = splits
    facts = StandardLibrary().describe()
    assert StandardLibrary().documents("validation") == validation
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == platform.python_version()
    assert facts["train"]["documents"] == len(train)
    assert facts["validation"]["bytes"] == sum(len(text.encode()) for text in validation)


def test_the_split_depends_on_relative_paths_alone(tmp_path):
    names = [f"package/module_{i}.py" for i in range(60)]
    write(tmp_path / "here", names)
    write(tmp_path / "there", names)
    here, there = read_tree(tmp_path / "here"), read_tree(tmp_path / "there")
    assert here == there and here.validation and here.train


def test_tests_caches_and_installed_packages_are_left_out(tmp_path):
    write(tmp_path, ["a.py", "test/b.py", "x/tests/c.py", "site-packages/d.py", "__pycache__/e.py", "f.txt"])
    tree = read_tree(tmp_path)
    assert tree.train + tree.validation == ["x = 1\n# a.py\n"]


def test_file_that_is_not_utf8_is_counted_and_skipped(tmp_path):
    write(tmp_path, ["a.py"])
    (tmp_path / "latin.py").write_bytes("# \u00e4\n".encode("latin-1"))
    tree = read_tree(tmp_path)
    assert tree.skipped == 1 and len(tree.train + tree.validation) == 1


def test_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no readable .py file under"):
        read_tree(tmp_path)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='test': allowed are 'train' and 'validation'"):
        check_split("test")
