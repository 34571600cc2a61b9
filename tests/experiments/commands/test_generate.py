"""`dynamoe generate` prints a prompt and what the model draws after it."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from dynamoe.experiments.training.restore import load_trained
from dynamoe.models.generate import Sampling, generate

Dynamoe = Callable[..., tuple[int, str, str]]


def test_the_same_seed_draws_the_same_text(dynamoe: Dynamoe, beside: Any) -> None:
    def text(seed: int) -> str:
        options = ("--run-dir", beside.run, "--tokens", "20", "--prompt", "line ", "--seed", seed)
        status, output, errors = dynamoe("generate", *options)
        assert (status, errors) == (0, "")
        return output

    first = text(5)
    assert first.startswith("line ")
    assert text(5) == first
    assert text(6) != first


def test_prints_what_the_model_draws(dynamoe: Dynamoe, beside: Any) -> None:
    trained = load_trained(beside.run)
    tokenizer = trained.experiment.tokenizer
    prompt = [token for token in (tokenizer.bos, *tokenizer.encode("line 1").tolist()) if token is not None]
    tokens = generate(
        trained.model,
        [prompt],
        tokens=40,
        sampling=Sampling(temperature=0.5, top_k=8),
        key=jax.random.key(0),
        stop=tokenizer.eos,
        vocab=tokenizer.vocab_size,
    )
    drawn = tokenizer.decode([int(token[0]) for token in tokens])
    options = ("--tokens", "40", "--sampling.temperature", "0.5", "--sampling.top-k", "8", "--prompt", "line 1")
    _, output, _ = dynamoe("generate", *options)
    announced, _, shown = output.partition("\n")
    assert announced.endswith("runs/mine")
    shown = shown.removeprefix("line 1").removesuffix("\n")
    assert len(shown) > 5
    # A last character whose bytes have not all been drawn is not shown.
    assert drawn.startswith(shown) and set(drawn[len(shown) :]) <= {"\ufffd"}


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--tokens", "0"), 1, "tokens is 0; it must be at least 1"),
        (("--sampling.temperature", "-1"), 2, "temperature is -1.0"),
        (("--sampling.top-k", "0"), 2, "top_k is 0; it must be at least 1"),
        (("--checkpoint", "9"), 1, "step is 9;"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, beside: Any, options: tuple[str, ...], status: int, message: str
) -> None:
    found, _, errors = dynamoe("generate", *options)
    assert found == status
    assert message in " ".join(errors.replace("│", "").split())
