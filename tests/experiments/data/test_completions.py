"""Prompts and completions out of files."""

import gzip
import json
from pathlib import Path

import pytest

from dynamoe.experiments.data import Bytes, Completion, Mixture, PromptCompletion, TextFiles, held_out, training_batches


def lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_pairs_are_read_in_order_and_the_last_are_held_out(tmp_path: Path) -> None:
    records = [{"prompt": f"q{n}", "completion": f"a{n}", "other": n} for n in range(4)]
    source = PromptCompletion(train=(lines(tmp_path / "a.jsonl", *records),))
    assert source.documents("train") == [Completion(f"q{n}", f"a{n}") for n in range(3)]
    assert source.documents("validation") == [Completion("q3", "a3")]
    facts = source.describe()
    assert facts["train"]["completions"]["documents"] == 3 and facts["train"]["completions"]["bytes"] == 6
    json.dumps(facts)


def test_answers_of_a_conversation_are_completions_of_all_before(tmp_path: Path) -> None:
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "farewell")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = lines(tmp_path / "a.jsonl", record)
    source = PromptCompletion(train=(path,), validation=(lines(tmp_path / "b.jsonl", record),), messages="messages")
    first, second = source.documents("train")
    assert first == Completion("system: be kind\nuser: hi\nassistant: ", "hello")
    assert second == Completion("system: be kind\nuser: hi\nassistant: hello\nuser: bye\nassistant: ", "farewell")


def test_held_out_bytes_are_those_of_the_completions(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"prompt": "long question", "completion": "yes"}).encode()))
    source = PromptCompletion(train=(), validation=(str(packed),))
    text = held_out(source, Bytes(), batch_size=2, sequence_length=32)
    assert (text.bytes, text.documents, text.tokens) == (3, 1, 4)  # y, e, s and the end


def test_texts_and_pairs_mix(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a text of some length, longer than a window of it" * 4)
    pairs = PromptCompletion(train=(lines(tmp_path / "a.jsonl", *[{"prompt": "q", "completion": "a"}] * 40),))
    mixture = Mixture(sources=(pairs, TextFiles(train=(str(tmp_path / "t.txt"),))), weights=(1.0, 1.0))
    text = held_out(mixture, Bytes(), batch_size=2, sequence_length=16)
    assert text.documents == 3
    batches = training_batches(mixture, Bytes(), batch_size=8, sequence_length=16, seed=0)
    learned = next(batches).learned
    assert learned.all(axis=1).any() and not learned.all(axis=1).all()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "a.jsonl, line 1 is no JSON"),
        ('{"prompt": "\\ud800", "completion": "a"}', {}, "line 1: field 'prompt' is no Unicode text"),
        ("[1]", {}, "a.jsonl, line 1 holds a list; expected an object"),
        ('{"prompt": "a"}', {}, r"line 1: field 'completion' is None; expected text, and fields are \['prompt'\]"),
        ('\n{"prompt": 1, "completion": "a"}', {}, "line 2: field 'prompt' is 1; expected text"),
        ('{"prompt": "a", "completion": ""}', {}, "field 'completion' is empty; there is nothing to learn"),
        ('{"m": []}', {"messages": "m"}, r"field 'm' is \[\]; expected a list of messages"),
        ('{"m": [{"role": "user"}]}', {"messages": "m"}, "expected an object with role and content, both text"),
        ('{"m": [{"role": "user", "content": "a"}]}', {"messages": "m"}, "has no message of the role assistant"),
    ],
)
def test_refuses_with_file_and_line(tmp_path: Path, content: str, options: dict, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        PromptCompletion(train=(str(tmp_path / "a.jsonl"),), **options).documents("train")


def test_refuses_names_that_are_none() -> None:
    with pytest.raises(ValueError, match="prompt='': expected the name of a field"):
        PromptCompletion(train=("a",), prompt="")
    with pytest.raises(ValueError, match=r"train=\(\): expected at least one path or glob"):
        PromptCompletion(train=())
