"""Classification with exits: the engine against a loop that takes one row at a time, unpadded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import (
    Buckets,
    Constant,
    HiddenSimilarity,
    LearnedClassifier,
    NegativeEntropy,
    NeverExit,
    Patience,
    PerExit,
    StageOutput,
    Top2Gap,
    run_with_exits,
)

WEIGHTS = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
HEADS = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
X = np.random.default_rng(2).normal(size=(45, 6)).astype(np.float32)


def stage(at: int):
    @jax.jit
    def run(x):
        x = jnp.asarray(x)
        hidden = x + 0.3 * jnp.tanh(x @ WEIGHTS[at])
        return StageOutput(hidden, hidden, hidden @ HEADS[at])

    return run


STAGES = tuple(stage(at) for at in range(3))
CASES = [
    (Top2Gap(), Constant(threshold=0.5)),
    (NegativeEntropy(), PerExit(thresholds=(0.7, 0.4))),
    (HiddenSimilarity(), Constant(threshold=0.9)),
    (Patience(most=2), Constant(threshold=Patience(most=2).threshold(1))),
    (LearnedClassifier(width=6, exits=2, key=jax.random.key(0)), Constant(threshold=0.5)),
    (Top2Gap(), NeverExit()),
    (Top2Gap(), Constant(threshold=0.0)),
]


def one_by_one(confidence, thresholds) -> tuple[np.ndarray, np.ndarray]:
    exits, logits = [], []
    for row in X:
        carried, state = row[None], confidence.initial(1, 6)
        for at, run in enumerate(STAGES):
            carried, hidden, found = run(carried)
            index = jnp.full((1,), at, jnp.int32)
            score, state = confidence.score(index, found, hidden, state)
            if at == 2 or score[0] >= thresholds.at(index, index * 0)[0]:
                break
        exits.append(at)
        logits.append(np.asarray(found)[0])
    return np.array(exits), np.array(logits)


@pytest.mark.parametrize("confidence, thresholds", CASES, ids=lambda c: type(c).__name__)
def test_answers_equal_those_of_rows_taken_one_by_one(confidence, thresholds):
    exits, logits = one_by_one(confidence, thresholds)
    found = run_with_exits(STAGES, X, confidence, thresholds, Buckets(smallest=4, largest=16))
    np.testing.assert_array_equal(found.exit_index, exits)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_array_equal(found.prediction, logits.argmax(axis=1))
    assert found.rows == [int((exits >= at).sum()) for at in range(3)]
    assert found.rows_with_padding == [sum(Buckets(smallest=4, largest=16).sizes(rows)) for rows in found.rows]


def test_deep_stages_see_only_the_rows_that_remain():
    called = []

    def watched(at):
        def run(x):
            called.append((at, len(x)))
            return STAGES[at](x)

        return run

    run_with_exits([watched(at) for at in range(3)], X, Top2Gap(), Constant(threshold=0.0), Buckets(smallest=4))
    assert called == [(0, 64)]


def test_no_stage_and_no_row_are_refused():
    with pytest.raises(ValueError, match="stages is empty"):
        run_with_exits([], X, Top2Gap(), NeverExit(), Buckets())
    with pytest.raises(ValueError, match="inputs has arrays of .* rows"):
        run_with_exits(STAGES, X[:0], Top2Gap(), NeverExit(), Buckets())
    with pytest.raises(ValueError, match=r"inputs has arrays of \[2, 45\] rows"):
        run_with_exits(STAGES, (X, X[:2]), Top2Gap(), NeverExit(), Buckets())
