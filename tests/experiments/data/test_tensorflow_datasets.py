"""With the real `tensorflow_datasets`, on a dataset that fixtures/make_tfds.py wrote; TensorFlow is not needed."""

import json
from pathlib import Path

import pytest

from dynamoe.experiments.data import Bytes, TensorFlowDatasets, held_out, training_batches

FIXTURES = str(Path(__file__).parent / "fixtures")


def test_documents_are_the_examples():
    source = TensorFlowDatasets(name="tiny_text", data_dir=FIXTURES)
    train = source.documents("train")
    expected = {f"train document {i}:" + " w\u00f6rd" * (i + 1) for i in range(8)}
    assert len(train) == 8 and set(train) == expected
    assert train[-1] == train[7] and train[1:3] == [train[1], train[2]]
    assert all(text.startswith("validation document") for text in source.documents("validation"))


def test_slices_are_splits_too():
    source = TensorFlowDatasets(name="tiny_text:1.0.0", data_dir=FIXTURES, validation_split="train[75%:]")
    assert list(source.documents("validation")) == source.documents("train")[6:]


def test_batches_and_held_out_text():
    source = TensorFlowDatasets(name="tiny_text", data_dir=FIXTURES)
    batch = next(training_batches(source, Bytes(), batch_size=2, sequence_length=16, seed=0))
    assert batch.tokens.shape == (2, 17)
    assert held_out(source, Bytes(), batch_size=2, sequence_length=16).documents == 3


def test_description_names_the_version():
    facts = TensorFlowDatasets(name="tiny_text", data_dir=FIXTURES).describe()
    assert facts["name"] == "tiny_text/1.0.0" and facts["documents"] == {"train": 8, "validation": 3}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "gone"}, "name='gone', data_dir='.*fixtures': Dataset gone not found.$"),
        ({"name": "ag_news_subset"}, "name='ag_news_subset', .* not prepared there; .* tfds build ag_news_subset"),
        ({"split": "gone"}, "split='gone': tiny_text: Unknown split 'gone'"),
        ({"column": "body"}, r"column='body': tiny_text has the features \['text'\]"),
    ],
)
def test_what_is_not_there_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        TensorFlowDatasets(**{"name": "tiny_text", "data_dir": FIXTURES, **wrong}).documents("train")


def test_empty_name_is_refused():
    with pytest.raises(ValueError, match="name='': expected a name"):
        TensorFlowDatasets(name="")
