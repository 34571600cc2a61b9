"""The adapter against lm-evaluation-harness's own class for transformers, on the same tiny weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamoe.experiments.lm_evaluation import _Options, harness_model
from dynamoe.models.generation import Categorical, Greedy, Temperature, TopKTokens, TopPTokens

TEXTS = ["w4 w5 w6 w7 w8 w9", "w10", " ".join(f"w{4 + n % 28}" for n in range(150))]
PAIRS = [("w4 w5 ", "w6 w7"), ("w30", " w31"), ("", "w9 w10"), (TEXTS[2], " w4 w4")]


class Models(NamedTuple):
    ours: Any
    theirs: Any


@pytest.fixture
def models(published: Path) -> Models:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")
    pytest.importorskip("torch", reason="torch is not installed")
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (published / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))
    theirs = HFLM(pretrained=str(published), dtype="float32", device="cpu", batch_size=2, max_length=64)
    return Models(harness_model(published), theirs)


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(request_type=kind, doc={}, arguments=each, idx=n) for n, each in enumerate(arguments)]


@pytest.mark.parity
def test_likelihoods_are_those_of_the_harness(models: Models) -> None:
    asked = instances("loglikelihood", PAIRS)
    for found, expected in zip(*(model.loglikelihood(asked, disable_tqdm=True) for model in models), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-4) and found[1] == expected[1]
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    found, expected = (model.loglikelihood_rolling(rolling, disable_tqdm=True) for model in models)
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parity
def test_greedy_answers_are_those_of_the_harness(models: Models) -> None:
    options = {"until": ["w5"], "max_gen_toks": 6, "do_sample": False}
    asked = instances("generate_until", [(text, dict(options)) for text in TEXTS])
    found, expected = (model.generate_until(asked, disable_tqdm=True) for model in models)
    assert [text.split() for text in found] == [text.split() for text in expected]


@pytest.mark.parity
def test_a_task_has_the_harness_own_accuracy(models: Models, tmp_path: Path) -> None:
    import lm_eval  # pyright: ignore[reportMissingImports]

    rows = [{"q": f"w{4 + n} w{9 + n}", "choices": ["w4", "w5 w6", "w7"], "label": n % 3} for n in range(12)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tiny.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
    }
    found, expected = (
        lm_eval.simple_evaluate(model=model, tasks=[dict(task)], bootstrap_iters=0)["results"]["tiny"]["acc,none"]
        for model in models
    )
    assert found == expected


def test_options_of_tasks_become_samplers_and_stop_strings() -> None:
    greedy = _Options({"until": "\n", "do_sample": False, "temperature": 1.0})
    assert greedy.sampler == Greedy() and greedy.stop == ("\n",) and greedy.tokens == 256
    drawn = _Options({"until": ["a", ""], "temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_gen_toks": 7})
    filters = (Temperature(value=0.5), TopKTokens(k=3), TopPTokens(p=0.9))
    assert drawn.sampler == Categorical(filters=filters) and drawn.stop == ("a",) and drawn.tokens == 7
    with pytest.raises(ValueError, match="generation argument 'num_beams' is 4; known are"):
        _Options({"num_beams": 4})


def test_without_the_harness_it_says_what_to_install(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        harness_model(published)
