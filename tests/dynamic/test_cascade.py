"""Cascades against a loop over rows, their thresholds, and their curve against its definition."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import (
    Answers,
    Buckets,
    Cascade,
    Entropy,
    MaxProbability,
    Policy,
    TokenQuantile,
    cascade_curve,
    chosen_models,
    learn_then_test,
    of_chosen,
    thresholds_by_level,
)

X = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)


@jax.jit
def logits_of(x, weights):
    return x @ weights


@dataclass
class Linear:
    name: str
    cost: float
    weights: np.ndarray
    seen: list = field(default_factory=list)

    def __call__(self, inputs):
        self.seen.append(np.asarray(inputs))
        logits = logits_of(jnp.asarray(inputs), self.weights)
        return Answers(jnp.argmax(logits, axis=1), logits=logits)


def three_models() -> Cascade:
    models = tuple(Linear(f"model {i}", cost, WEIGHTS[i]) for i, cost in enumerate((1.0, 3.0, 10.0)))
    return Cascade(models=models, rules=(MaxProbability(), Entropy()), unit="FLOPs", buckets=Buckets(smallest=4))


def row_by_row(cascade: Cascade, thresholds) -> tuple[list[int], list[int], float]:
    predictions, models, cost = [], [], 0.0
    for row in X:
        for at, model in enumerate(cascade.models):
            cost += model.cost
            answers = jax.tree.map(np.asarray, model(row[None]))
            if at == 2 or cascade.rules[at].score(answers)[0] >= thresholds[at]:
                break
        predictions.append(int(answers.prediction[0]))
        models.append(at)
    return predictions, models, cost / len(X)


@pytest.mark.parametrize("thresholds", [(0.9, 0.6), (0.5, 0.9), (np.inf, 0.3), (0.0, 0.0), (np.inf, np.inf)])
def test_a_cascade_equals_rows_taken_one_by_one(thresholds):
    predictions, models, cost = row_by_row(three_models(), thresholds)
    found = three_models().run(X, thresholds)
    np.testing.assert_array_equal(found.prediction, predictions)
    np.testing.assert_array_equal(found.model, models)
    np.testing.assert_allclose(found.cost, cost)


def test_dearer_models_really_see_only_what_was_handed_on():
    cascade = three_models()
    found = cascade.run(X, (0.9, 0.6))
    assert 0 < found.rows[2] < found.rows[1] < found.rows[0] == 37
    for at, model in enumerate(cascade.models):
        handed_on = X[found.model >= at]
        [seen] = model.seen
        np.testing.assert_array_equal(seen[: len(handed_on)], handed_on)
        assert len(seen) == found.rows_with_padding[at] == Buckets(smallest=4).size(len(handed_on))
    assert found.cost_with_padding == sum(np.array(found.rows_with_padding) * [1, 3, 10]) / 37


def test_without_thresholds_the_last_model_alone_is_asked():
    cascade = three_models()
    found = cascade.run(X, None)
    np.testing.assert_array_equal(found.prediction, (X @ WEIGHTS[2]).argmax(axis=1))
    assert (found.rows, found.cost) == ([0, 0, 37], 10.0)


class TinyDecoder:
    """Says the same token three times; how sure it is differs from token to token."""

    def __init__(self, name: str, cost: float, token: int, length: int = 3):
        self.name, self.cost, self.token, self.length = name, cost, token, length

    def __call__(self, inputs):
        rows = jnp.asarray(inputs).shape[0]
        sure = jnp.log(jnp.asarray(inputs)[:, :1] * jnp.asarray([1.0, 0.5, 1.0], jnp.float32)[None])
        return Answers(jnp.full((rows, self.length), self.token, jnp.int32), token_log_probs=sure)


def test_decoders_hand_on_whole_answers():
    small, large = TinyDecoder("small", 1.0, 7), TinyDecoder("large", 9.0, 8)
    cascade = Cascade(models=(small, large), rules=(TokenQuantile(quantile=0.0),), unit="seconds")
    sure = np.array([[0.9], [0.5], [1.0]], np.float32)
    found = cascade.run(sure, (0.4,))
    np.testing.assert_array_equal(found.prediction, [[7] * 3, [8] * 3, [7] * 3])
    assert (found.rows, found.cost, found.cost_with_padding) == ([3, 1], 4.0, 80 / 3)
    other = Cascade(models=(small, TinyDecoder("long", 9.0, 8, 5)), rules=(TokenQuantile(),), unit="seconds")
    with pytest.raises(ValueError, match=r"long answers in int32\[5\] a row; the models before it in int32\[3\]"):
        other.run(sure, (0.4,))


def test_outcomes_tell_what_any_thresholds_would_do():
    cascade = three_models()
    predictions, scores = cascade.outcomes(X)
    candidates = np.array([[np.inf, np.inf], [0.9, 0.6], [0.5, 0.9], [0, 0]])
    chosen = chosen_models(scores, candidates)
    given = of_chosen(np.stack(predictions, axis=1).astype(np.float64), chosen)
    for j, thresholds in enumerate(candidates):
        found = cascade.run(X, thresholds.tolist())
        np.testing.assert_array_equal(chosen[:, j], found.model)
        np.testing.assert_array_equal(given[:, j], found.prediction)
        np.testing.assert_allclose(cascade.paid[chosen[:, j]].mean(), found.cost)


def test_thresholds_of_a_calibrated_risk_run_the_cascade():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    weights = WEIGHTS[:1] + np.array([0.3, 0.1, 0])[:, None, None] * WEIGHTS
    models = tuple(Linear(f"model {i}", cost, weights[i]) for i, cost in enumerate((1.0, 3.0, 10.0)))
    cascade = Cascade(models=models, rules=(MaxProbability(), Entropy()), unit="FLOPs")
    levels = np.linspace(0.99, 0, 34).tolist()
    candidates = thresholds_by_level(cascade.outcomes(x[:200]).scores, levels)
    predictions, scores = cascade.outcomes(x[200:])
    losses = np.stack([p != predictions[2] for p in predictions], axis=1).astype(np.float64)
    chosen = chosen_models(scores, candidates)
    policy = Policy(
        confidence=cascade.describe(), exits=(0, 1, 2), thresholds="levels", keys_values="none", batch="rows", model="m"
    )
    guarantee = learn_then_test(
        of_chosen(losses, chosen),
        [tuple(row) for row in candidates.tolist()],
        policy=policy,
        risk="disagreement with the last model",
        unit="inputs",
        delta=0.15,
        epsilon=0.05,
        costs=cascade.paid[chosen],
    )
    assert isinstance(guarantee.threshold, tuple)
    guarantee.check(policy)
    found = cascade.run(x[200:], guarantee.threshold)
    np.testing.assert_allclose(found.cost, guarantee.cost)
    np.testing.assert_allclose((found.prediction != predictions[2]).mean(), guarantee.empirical_risk)


def test_levels_hand_on_their_share():
    scores = np.random.default_rng(4).uniform(size=(1000, 2))
    candidates = thresholds_by_level(scores, (1.0, 0.5, 0.0))
    np.testing.assert_array_equal(candidates[0], np.inf)
    np.testing.assert_allclose((scores[:, None] < candidates[None]).mean(axis=0), [[1, 1], [0.5, 0.5], [0, 0]])


def test_the_curve_holds_every_threshold_and_its_area_is_the_mean_height():
    # Two models of costs 1 and 4; the rule is right about which answers are bad: rows 2 and 3 of 4.
    scores = np.array([[0.9], [0.8], [0.3], [0.2]])
    quality = np.array([[1.0, 1], [1, 1], [0, 1], [0, 1]])
    curve = cascade_curve(scores, quality, np.array([1.0, 4.0]))
    # 0, 1, 2, 3 and 4 rows handed on, 4/4 of a cost each.
    np.testing.assert_allclose(curve.cost, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(curve.quality, [0.5, 0.75, 1, 1, 1])
    # Trapezia from 1 to 4: (0.625 + 0.875 + 1) / 3.
    np.testing.assert_allclose(curve.area, 2.5 / 3)
    np.testing.assert_allclose(curve.random_area, 0.75)
    np.testing.assert_allclose(curve.model_quality, [0.5, 1])
    assert [curve.within(budget) for budget in (1.0, 2.9, 3.0, 100.0)] == [0, 1, 2, 2]
    np.testing.assert_allclose(curve.candidates[curve.within(3.0)], [0.8])
    with pytest.raises(ValueError, match="budget is 0.5; the cheapest candidate costs 1.0"):
        curve.within(0.5)


def test_a_rule_that_knows_nothing_is_worse_than_sending_rows_by_chance():
    rng = np.random.default_rng(5)
    quality = (rng.uniform(size=(5000, 2)) < [0.6, 0.9]).astype(np.float64)
    curve = cascade_curve(rng.uniform(size=(5000, 1)), quality, np.array([1.0, 4.0]))
    # It pays the small model for rows that it hands on: quality 0.6 + 0.3 (cost - 1) / 4, over costs of 1 to 4.
    np.testing.assert_allclose(curve.area, 0.6 + 0.3 * 1.5 / 4, atol=0.02)
    assert curve.area < curve.random_area


def test_bad_cascades_thresholds_and_curves_are_refused():
    models, rules = three_models().models, three_models().rules
    with pytest.raises(ValueError, match="Cascade.models has 3 and Cascade.rules 1"):
        Cascade(models=models, rules=rules[:1], unit="FLOPs")
    with pytest.raises(ValueError, match=r"costs must ascend"):
        Cascade(models=models[::-1], rules=rules, unit="FLOPs")
    with pytest.raises(ValueError, match="thresholds has 1; the cascade has 2 rules"):
        three_models().run(X, (0.5,))
    with pytest.raises(ValueError, match="thresholds is 1.5; it must be 0 to 1"):
        three_models().run(X, (0.5, 1.5))
    with pytest.raises(ValueError, match="inputs has no rows"):
        three_models().run(X[:0], (0.5, 0.5))
    with pytest.raises(ValueError, match="they must descend"):
        thresholds_by_level(X, (0.1, 0.9))
    scores = np.zeros((4, 2))
    with pytest.raises(ValueError, match="candidates is None; with 2 rules name them"):
        cascade_curve(scores, np.zeros((4, 3)), np.arange(1.0, 4))
    with pytest.raises(
        ValueError, match=r"quality has the shape \(4, 2\) and costs \(2,\); with scores of 4 rows and 2"
    ):
        cascade_curve(scores, np.zeros((4, 2)), np.arange(1.0, 3))
    with pytest.raises(ValueError, match="add a candidate that hands nothing on"):
        _ = cascade_curve(scores, np.zeros((4, 3)), np.arange(1.0, 4), np.zeros((1, 2))).area
