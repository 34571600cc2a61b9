import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given

from dynamoe.experiments.data import Bytes, HuggingFaceTokenizer, SentencePiece, check_vocabulary

CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<mark>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.enable_truncation(4)
    model.enable_padding(length=64)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=36, minloglevel=2
        )
    return str(path)


@given(st.text())
def test_bytes_give_any_text_back(text):
    assert Bytes().decode(Bytes().encode(text)) == text
    assert Bytes().decode(Bytes().encode_document(text)) == text


def test_bytes_by_hand():
    np.testing.assert_array_equal(Bytes().encode_document("a\u00e4"), [256, 97, 0xC3, 0xA4, 257])
    assert Bytes().encode("a").dtype == np.int32
    assert Bytes().decode([0xC3]) == "\ufffd"
    assert Bytes().vocab_size == 258


def test_hugging_face_tokenizer_gives_text_back_whole(tokenizer_json):
    tokenizer = HuggingFaceTokenizer(path=tokenizer_json)
    text = "the lazy fox packs \u00e4 box and then some more words"
    ids = tokenizer.encode_document(text)
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert len(ids) > 6  # the file asks for truncation at 4
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == 300


def test_hugging_face_tokenizer_agrees_with_the_library(tokenizer_json):
    library = tokenizers.Tokenizer.from_file(tokenizer_json)
    library.no_truncation()
    library.no_padding()
    many = HuggingFaceTokenizer(path=tokenizer_json).encode_many(CORPUS[:2])
    assert [ids.tolist() for ids in many] == [library.encode(text).ids for text in CORPUS[:2]]


def test_hugging_face_tokenizer_takes_named_marks(tokenizer_json):
    tokenizer = HuggingFaceTokenizer(path=tokenizer_json, bos_token="<mark>", eos_token="<mark>")
    assert (tokenizer.bos, tokenizer.eos) == (2, 2)
    with pytest.raises(ValueError, match="eos_token='<gone>': .* has no such token"):
        _ = HuggingFaceTokenizer(path=tokenizer_json, eos_token="<gone>").eos


def test_sentencepiece_gives_text_back(sentencepiece_model):
    tokenizer = SentencePiece(path=sentencepiece_model)
    library = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    ids = tokenizer.encode_document(CORPUS[0])
    assert ids.tolist() == [1, *library.encode(CORPUS[0]), 2]
    assert tokenizer.decode(ids) == CORPUS[0]
    assert ids.dtype == np.int32 and tokenizer.vocab_size == 36


def test_tokenizers_are_values(tokenizer_json):
    first, second = HuggingFaceTokenizer(path=tokenizer_json), HuggingFaceTokenizer(path=tokenizer_json)
    first.encode("warm")
    assert first == second and hash(first) == hash(second)
    assert repr(first) == f"HuggingFaceTokenizer(path={tokenizer_json!r}, bos_token=None, eos_token=None)"


@pytest.mark.parametrize("kind", [HuggingFaceTokenizer, SentencePiece])
def test_unreadable_tokenizer_file_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(path='.*gone'\): cannot be read"):
        kind(path=str(tmp_path / "gone")).encode("a")
    (tmp_path / "broken").write_text("not a tokenizer")
    with pytest.raises(ValueError, match=r"path='.*broken'\): not a "):
        kind(path=str(tmp_path / "broken")).encode("a")


def test_vocabulary_that_is_too_small_is_refused():
    check_vocabulary(Bytes(), 258)
    with pytest.raises(ValueError, match=r"vocab=257: Bytes\(\) has 258 ids"):
        check_vocabulary(Bytes(), 257)


def test_an_empty_mark_is_none(tokenizer_json):
    tokenizer = HuggingFaceTokenizer(path=tokenizer_json, bos_token="", eos_token="")
    assert tokenizer.bos is None and tokenizer.eos is None


def test_what_a_file_puts_before_a_text_is_told(tokenizer_json, tmp_path):
    assert HuggingFaceTokenizer(path=tokenizer_json).first_special() is None
    loaded = tokenizers.Tokenizer.from_file(tokenizer_json)
    loaded.post_processor = tokenizers.processors.TemplateProcessing(single="<mark> $A", special_tokens=[("<mark>", 2)])
    loaded.save(str(tmp_path / "tokenizer.json"))
    assert HuggingFaceTokenizer(path=str(tmp_path / "tokenizer.json")).first_special() == "<mark>"
