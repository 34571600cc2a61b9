"""With the real `datasets`, on files that these tests write. Nothing is asked of a network."""

import json

import datasets
import datasets.config
import pytest

from dynamoe.experiments.data import Bytes, HuggingFace, held_out, training_batches
from dynamoe.experiments.serialization import from_json, to_json

DOCUMENTS = [f"document {i} " + "word " * (i * 7 % 11) for i in range(30)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(params=["json", "parquet", "text"])
def files(request, tmp_path):
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "number": list(range(30))})
    path = tmp_path / f"data.{request.param}"
    if request.param == "json":
        table.to_json(path)
    elif request.param == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n".join(DOCUMENTS) + "\n")
    return {"path": request.param, "data_files": {"train": str(path), "validation": (str(path),)}}


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return {"path": "json", "data_files": {"train": str(path), "validation": str(path)}}


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_the_rows_of_the_column(files, streaming):
    source = HuggingFace(**files, streaming=streaming)
    assert list(source.documents("train")) == DOCUMENTS
    assert source.streams == streaming
    assert json.loads(json.dumps(source.describe())) == source.describe()


def test_slices_split_a_dataset_that_has_one_split(jsonl):
    source = HuggingFace(**jsonl, split="train[:90%]", validation_split="train[90%:]")
    assert list(source.documents("train")) == DOCUMENTS[:27]
    assert list(source.documents("validation")) == DOCUMENTS[27:]
    assert source.describe()["documents"] == 27


def test_stream_resumes_after_any_document(jsonl):
    source = HuggingFace(**jsonl, streaming=True)
    for number, (_, state) in enumerate(source.stream("train"), 1):
        restored = json.loads(json.dumps(state))
        assert [text for text, _ in source.stream("train", restored)] == DOCUMENTS[number:]


def test_streamed_batches_resume_in_any_round(jsonl):
    source = HuggingFace(**jsonl, streaming=True)
    settings = {"batch_size": 4, "sequence_length": 16, "seed": 1}
    batches = training_batches(source, Bytes(), **settings)
    for _ in range(40):  # the corpus has about 60 windows: into the third round
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    resumed = training_batches(source, Bytes(), **settings)
    resumed.set_state(state)
    for batch in expected:
        assert next(resumed).tokens.tolist() == batch.tokens.tolist()


def test_held_out_text_comes_from_a_stream_too(jsonl):
    whole = held_out(HuggingFace(**jsonl), Bytes(), batch_size=2, sequence_length=32)
    streamed = held_out(HuggingFace(**jsonl, streaming=True), Bytes(), batch_size=2, sequence_length=32)
    assert whole.bytes == streamed.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert all((a.tokens == b.tokens).all() for a, b in zip(whole.batches, streamed.batches, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split_and_column_are_named(jsonl, streaming):
    with pytest.raises(ValueError, match="validation_split='gone'.* cannot be loaded: .*gone.*train"):
        list(HuggingFace(**jsonl, validation_split="gone", streaming=streaming).documents("validation"))
    with pytest.raises(ValueError, match=r"column='body': .* has the columns \['text'\]"):
        list(HuggingFace(**jsonl, column="body", streaming=streaming).documents("train"))


def test_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"HuggingFace\(path='.*gone', .* cannot be loaded"):
        HuggingFace(path=str(tmp_path / "gone")).documents("train")


def test_slice_of_a_stream_is_refused():
    with pytest.raises(ValueError, match=r"split='train\[:5\]'.* a slice needs streaming=False"):
        HuggingFace(path="json", split="train[:5]", streaming=True)


def test_data_files_survive_in_the_configuration_of_a_run() -> None:
    source = HuggingFace(path="json", data_files={"train": "a.jsonl", "validation": ("b.jsonl", "c.jsonl")})
    again = from_json(json.loads(json.dumps(to_json(source))))
    assert again == source and hash(again) == hash(source)
    assert source.data_files == (("train", ("a.jsonl",)), ("validation", ("b.jsonl", "c.jsonl")))
