"""Published models and their tokenizers, as they lie in a folder."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from dynamoe.experiments.published import find_tokenizer, is_published, load_published, open_tokenizer

FIXTURES = Path(__file__).parents[1] / "models" / "checkpoints" / "fixtures"


def test_the_tokenizer_beside_the_weights_begins_documents_as_its_file_does(published: Path) -> None:
    found = load_published(published)
    assert (found.tokenizer.bos, found.tokenizer.eos) == (1, 2)
    assert found.stop_tokens == (2,) and found.longest == 64
    file = published / "tokenizer.json"
    plain = json.loads(file.read_text()) | {"post_processor": None}
    file.write_text(json.dumps(plain))
    assert load_published(published).tokenizer.bos is None  # though it knows <s>


def test_the_end_is_what_the_settings_name(published: Path) -> None:
    (published / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    (published / "generation_config.json").write_text('{"eos_token_id": [2, 5, 77]}')
    found = load_published(published)
    assert found.tokenizer.eos == 3
    assert found.stop_tokens == (2, 3, 5)  # 77 is outside of the vocabulary


def test_a_folder_of_a_run_is_no_published_model(published: Path, tmp_path: Path) -> None:
    assert is_published(published)
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_published(tmp_path) and not is_published(tmp_path / "nowhere")


def test_a_model_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "olmoe", tmp_path / "olmoe")
    with pytest.raises(ValueError, match=r"model .*olmoe: neither tokenizer.json nor tokenizer.model lies beside"):
        load_published(tmp_path / "olmoe")
    with pytest.raises(ValueError, match="give the tokenizer's file"):
        find_tokenizer([], name="x")


def test_a_tokenizer_is_refused_by_its_ending_and_by_its_size(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer is a\.txt; it must end in \.json .* or in \.model"):
        open_tokenizer(Path("a.txt"))
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(tmp_path / "large.json"))
    with pytest.raises(ValueError, match="vocab=32: .* has 40 ids"):
        load_published(published, tokenizer=tmp_path / "large.json")
