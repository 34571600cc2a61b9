"""`dynamoe generate` prints prompts and what the model draws after them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.commands.generate import Generate, continuation, in_order, sampler_of
from dynamoe.experiments.training.restore import load_trained
from dynamoe.models.generation import (
    Categorical,
    Finish,
    Greedy,
    MinPTokens,
    Piece,
    RepetitionPenalty,
    Temperature,
    TopKTokens,
    TopPTokens,
)

Dynamoe = Callable[..., tuple[int, str, str]]


def test_the_same_seed_draws_the_same_text(dynamoe: Dynamoe, beside: Any) -> None:
    def text(seed: int) -> str:
        options = ("--run-dir", beside.run, "--tokens", "20", "--prompt", "line ", "--seed", seed)
        status, output, errors = dynamoe("generate", *options)
        assert status == 0
        assert re.search(r"^6 tokens read in .* \(\d+ a second\); \d+ tokens drawn in", errors)
        return output

    first = text(5)
    assert first.startswith("line ")
    assert text(5) == first
    assert text(6) != first


def test_prints_what_the_model_draws(dynamoe: Dynamoe, beside: Any) -> None:
    trained = load_trained(beside.run)
    sampler = Categorical(filters=(Temperature(value=0.5), TopKTokens(k=8)))
    pieces = continuation(trained.model, trained.experiment.tokenizer, "line 1", tokens=40, sampler=sampler, seed=0)
    drawn = "".join(pieces)
    # The names that these options had at first are still taken.
    options = ("--max-tokens", "40", "--sampling.temperature", "0.5", "--top-k", "8", "--prompt", "line 1")
    _, output, _ = dynamoe("generate", *options)
    announced, _, shown = output.partition("\n")
    assert announced.endswith("runs/mine")
    assert shown == f"line 1{drawn}\n" and len(drawn) > 5


def test_a_file_of_prompts_gives_each_what_it_gets_alone(dynamoe: Dynamoe, beside: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("line 1\nanother line\nx\n")
    run, greedy = ("--run-dir", beside.run), ("--temperature", "0", "--tokens", "12")
    _, output, _ = dynamoe("generate", *run, *greedy, "--prompts-file", file, "--batch", "2")
    alone = [dynamoe("generate", *run, *greedy, "--prompt", prompt)[1] for prompt in ("line 1", "another line", "x")]
    assert output == "".join(alone)


def test_a_stop_string_ends_the_text(dynamoe: Dynamoe, beside: Any) -> None:
    options = ("--run-dir", beside.run, "--tokens", "12", "--prompt", "line ", "--seed", "5")
    _, whole, _ = dynamoe("generate", *options)
    answer = whole.removeprefix("line ").removesuffix("\n")
    _, cut, _ = dynamoe("generate", *options, "--stop", answer[3:5])
    assert cut == f"line {answer[: answer.index(answer[3:5])]}\n"


def test_ctrl_c_leaves_what_was_drawn(dynamoe: Dynamoe, beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        yield Piece(0, "abc", None)
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamoe.experiments.commands.generate.generate_text", interrupted)
    status, output, errors = dynamoe("generate", "--run-dir", beside.run, "--prompt", "line ")
    assert (status, output) == (130, "line abc\n")
    assert "nothing was drawn" in errors


def test_answers_are_shown_in_the_order_of_the_prompts() -> None:
    pieces = [
        Piece(1, "b", None),
        Piece(0, "a", None),
        Piece(1, "B", Finish.STOP),
        Piece(0, "A", Finish.LENGTH),
        Piece(2, "c", Finish.LENGTH),
    ]
    shown = list(in_order(["1 ", "2 ", "3 "], iter(pieces)))
    assert "".join(shown) == "1 aA\n2 bB\n3 c\n"
    assert shown.index("a") < shown.index("A")  # as they come


def test_filters_stand_in_transformers_order() -> None:
    options = Generate(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2)
    filters = (
        RepetitionPenalty(penalty=1.2),
        Temperature(value=0.7),
        TopKTokens(k=9),
        TopPTokens(p=0.8),
        MinPTokens(p=0.1),
    )
    assert sampler_of(options) == Categorical(filters=filters)
    assert sampler_of(Generate(temperature=0.0, top_k=9)) == Greedy()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--tokens", "0"), 2, "tokens is 0; it must be at least 1"),
        (("--temperature", "-1"), 2, "temperature is -1.0; it must be finite and at least 0"),
        (("--top-k", "0"), 2, "TopKTokens.k is 0; it must be at least 1"),
        (("--checkpoint", "9"), 1, "step is 9;"),
        (("--prompt", "line 1", "--context", "3"), 1, "Request.prompt has 7 tokens; the cache holds 3"),
        (("--prompts-file", "missing.txt"), 1, "missing.txt"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, beside: Any, options: tuple[str, ...], status: int, message: str
) -> None:
    found, _, errors = dynamoe("generate", *options)
    assert found == status
    assert message in " ".join(errors.replace("│", "").split())
