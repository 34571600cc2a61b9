"""Scores of continuations against whole forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.experiments.scoring import Pair, score
from dynamoe.models import Attention, Decoder, Dense
from dynamoe.moe import DenseDispatcher, MoE, SwiGLU

CONFIG = Decoder(vocab=20, width=16, layers=1, attention=Attention(heads=2), ffn=Dense(hidden=16), loss_block=8)
RNG = np.random.default_rng(0)
PAIRS = [
    Pair(RNG.integers(0, 20, context).tolist(), RNG.integers(0, 20, continuation).tolist())
    for context, continuation in ((3, 2), (40, 5), (1, 1), (9, 30), (2, 7))
]


@pytest.fixture(
    scope="module", params=[CONFIG.ffn, MoE(experts=2, expert=SwiGLU(hidden=8), dispatcher=DenseDispatcher())]
)
def model(request):
    return dataclasses.replace(CONFIG, ffn=request.param).build(jax.random.key(0))


def alone(model, pair, longest=1000):
    ids = np.array([*pair.context, *pair.continuation])[-(longest + 1) :]
    logits = np.asarray(model(jnp.asarray(ids[None, :-1])).logits[0], np.float64)
    logits = logits[-len(pair.continuation) :]
    chances = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.array(pair.continuation)
    return chances[np.arange(len(targets)), targets].sum(), bool((logits.argmax(axis=1) == targets).all())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_continuation_is_scored_as_if_it_were_alone(model, rows) -> None:
    for found, pair in zip(score(model, PAIRS, longest=64, rows=rows), PAIRS, strict=True):
        expected, greedy = alone(model, pair)
        assert found.log_likelihood == pytest.approx(expected, abs=1e-4) and found.greedy == greedy


def test_the_most_likely_continuation_is_called_so(model) -> None:
    context = [1, 2, 3]
    best = int(model(jnp.asarray([context])).logits[0, -1].argmax())
    found = score(model, [Pair(context, [best]), Pair(context, [(best + 1) % 20])], longest=64)
    assert [each.greedy for each in found] == [True, False]


def test_a_long_context_loses_its_beginning(model) -> None:
    (found,) = score(model, PAIRS[1:2], longest=8)
    assert found.log_likelihood == pytest.approx(alone(model, PAIRS[1], longest=8)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([Pair([], [1])], {}, r"pairs\[0\] is .*; context and continuation must have a token each"),
        ([Pair([1], [])], {}, "must have a token each"),
        ([Pair([1], [1] * 9)], {"longest": 8}, r"pairs\[0\] has a continuation of 9 tokens; the model reads 8"),
        ([], {"rows": 0}, "rows is 0; it must be at least 1"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(model, pairs, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        score(model, pairs, **{"longest": 64, **options})
