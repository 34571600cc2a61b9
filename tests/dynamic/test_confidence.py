"""Confidences against float64 NumPy, and what all of them promise: 0 to 1, row by row, the same under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.dynamic import HiddenSimilarity, LearnedClassifier, NegativeEntropy, Patience, Top2Gap

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32) * 2
HIDDEN = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
ALL = [
    Top2Gap(),
    NegativeEntropy(),
    HiddenSimilarity(),
    Patience(most=2),
    LearnedClassifier(width=4, exits=2, key=jax.random.key(0)),
    LearnedClassifier(width=4, exits=2, neurons=3, key=jax.random.key(0)),
]


def index(exit_index: int, rows: int = 5) -> jax.Array:
    return jnp.full((rows,), exit_index, jnp.int32)


def scores(confidence, logits=LOGITS, hidden=HIDDEN) -> np.ndarray:
    """Of all exits, one after the other: [N, B]."""
    state, found = confidence.initial(logits.shape[1], hidden.shape[2]), []
    for at in range(len(logits)):
        score, state = confidence.score(
            index(at, logits.shape[1]), jnp.asarray(logits[at]), jnp.asarray(hidden[at]), state
        )
        found.append(np.asarray(score))
    return np.stack(found)


@pytest.mark.parametrize("confidence", ALL, ids=lambda c: type(c).__name__)
def test_scores_lie_between_0_and_1_and_rows_do_not_see_each_other(confidence):
    together = scores(confidence)
    assert ((together >= 0) & (together <= 1)).all()
    alone = scores(confidence, LOGITS[:, 2:3], HIDDEN[:, 2:3])
    np.testing.assert_allclose(together[:, 2:3], alone, atol=1e-6)


@pytest.mark.parametrize("confidence", ALL, ids=lambda c: type(c).__name__)
def test_jit_equals_eager_where_rows_stand_at_different_exits(confidence):
    mixed, state = jnp.asarray([0, 1, 0, 1, 1], jnp.int32), confidence.initial(5, 4)
    score = confidence.score
    arguments = (mixed, jnp.asarray(LOGITS[1]), jnp.asarray(HIDDEN[1]), state)
    np.testing.assert_allclose(jax.jit(score)(*arguments)[0], score(*arguments)[0], atol=1e-6)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.float64(logits))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_top_2_gap_by_sorting():
    ordered = np.sort(softmax(LOGITS), axis=-1)
    np.testing.assert_allclose(scores(Top2Gap()), ordered[..., -1] - ordered[..., -2], atol=1e-6)


def test_entropy_by_its_formula_and_at_its_ends():
    p = softmax(LOGITS)
    np.testing.assert_allclose(scores(NegativeEntropy()), 1 + (p * np.log(p)).sum(axis=-1) / np.log(7), atol=1e-6)
    ends = np.array([[[0.0] * 7, [1e9] + [0.0] * 6, [-np.inf] * 6 + [0.0]]], np.float32)
    np.testing.assert_allclose(scores(NegativeEntropy(), ends, HIDDEN[:1, :3]), [[0, 1, 1]], atol=1e-6)


def test_similarity_is_0_at_the_first_exit_then_the_cosine():
    found, h = scores(HiddenSimilarity()), np.float64(HIDDEN)
    cosine = (h[0] * h[1]).sum(-1) / np.linalg.norm(h[0], axis=-1) / np.linalg.norm(h[1], axis=-1)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1], np.maximum(cosine, 0), atol=1e-6)
    np.testing.assert_allclose(scores(HiddenSimilarity(), LOGITS, np.stack([HIDDEN[0]] * 3))[1:], 1, atol=1e-6)


def test_patience_counts_unchanged_predictions_in_a_row():
    # Predictions of one row at five exits: 3, 3, 1, 1, 1. Repetitions: 0, 1, 0, 1, 2.
    logits = np.eye(4, dtype=np.float32)[[3, 3, 1, 1, 1]][:, None]
    confidence = Patience(most=3)
    found = scores(confidence, logits, np.zeros((5, 1, 1), np.float32))[:, 0]
    np.testing.assert_allclose(found, np.array([0, 1, 0, 1, 2]) / 3, atol=1e-6)
    assert list(found >= confidence.threshold(2)) == [False, False, False, False, True]


def test_learned_classifier_reads_each_rows_own_exit():
    for neurons in (None, 3):
        confidence = LearnedClassifier(width=4, exits=2, neurons=neurons, key=jax.random.key(1))
        mixed = jnp.asarray([0, 1, 0, 1, 1], jnp.int32)
        x = jnp.asarray(HIDDEN[0])
        each = [np.asarray(confidence.logit(index(at), x)) for at in (0, 1)]
        np.testing.assert_allclose(confidence.logit(mixed, x), np.choose([0, 1, 0, 1, 1], each), atol=1e-6)


def test_learned_classifiers_loss_by_its_formula_and_it_learns_agreement(key):
    confidence = LearnedClassifier(width=4, exits=2, key=key)
    found = np.stack([np.float64(confidence.logit(index(at), jnp.asarray(HIDDEN[at]))) for at in (0, 1)])
    agrees = LOGITS.argmax(-1)[:2] == LOGITS.argmax(-1)[2]
    p = 1 / (1 + np.exp(-found))
    expected = -np.where(agrees, np.log(p), np.log1p(-p)).mean()
    data = jnp.asarray(HIDDEN), jnp.asarray(LOGITS)
    np.testing.assert_allclose(confidence.loss(*data), expected, rtol=1e-5)

    graph, state = nnx.split(confidence)
    step = jax.jit(
        lambda s: jax.tree.map(lambda w, g: w - g, s, jax.grad(lambda t: nnx.merge(graph, t).loss(*data))(s))
    )
    for _ in range(300):
        state = step(state)
    # Linear classifiers of 4 numbers and a bias can part 5 points in general position.
    assert nnx.merge(graph, state).loss(*data) < 0.1 * expected


def test_another_classifiers_weights_are_another_description(key):
    one, same = (LearnedClassifier(width=4, exits=2, key=key) for _ in range(2))
    assert one.describe() == same.describe()
    same.bias[...] = same.bias[...] + 1
    assert one.describe() != same.describe()
    assert Patience(most=2).describe() == {"type": "Patience", "most": 2}


def test_bad_options_are_refused(key):
    with pytest.raises(ValueError, match=r"Patience.most is 0; it must be at least 1"):
        Patience(most=0)
    with pytest.raises(ValueError, match=r"patience is 4; it must be 1 to Patience.most = 3"):
        Patience(most=3).threshold(4)
    with pytest.raises(ValueError, match=r"exits is 0"):
        LearnedClassifier(width=4, exits=0, key=key)
