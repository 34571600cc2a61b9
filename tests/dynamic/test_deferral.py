"""Deferral rules by hand, and a learned one against its own condition of being best."""

import numpy as np
import pytest
from scipy import optimize

from dynamoe.dynamic import (
    Agreement,
    Answers,
    Entropy,
    LearnedDeferral,
    MaxProbability,
    TokenQuantile,
    fit_deferral,
)

NOTHING = np.zeros(2, int)


def test_probability_and_entropy_of_classes():
    p = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0]])
    with np.errstate(divide="ignore"):
        answers = Answers(p.argmax(axis=1), logits=np.log(p) + 7)
    np.testing.assert_allclose(MaxProbability().score(answers), [0.5, 1 / 3, 1])
    entropy = 1.5 * np.log(2)  # of 1/2, 1/4, 1/4 in nats
    np.testing.assert_allclose(Entropy().score(answers), [1 - entropy / np.log(3), 0, 1], atol=1e-12)


def test_token_quantile_reads_only_tokens_of_the_answer():
    p = np.array([[0.9, 0.5, 0.7, 0.1], [0.8, 0.6, 0.4, 0.2]])
    counted = np.array([[True, True, True, False], [True, True, True, True]])
    answers = Answers(NOTHING, token_log_probs=np.log(p), counted=counted)
    np.testing.assert_allclose(TokenQuantile(quantile=0.0).score(answers), [0.5, 0.2])
    np.testing.assert_allclose(TokenQuantile(quantile=1.0).score(answers), [0.9, 0.8])
    np.testing.assert_allclose(TokenQuantile(quantile=0.5).score(answers), [0.7, (0.6 * 0.4) ** 0.5])
    np.testing.assert_allclose(TokenQuantile().score(answers._replace(counted=None)), [0.1, 0.2])
    with pytest.raises(ValueError, match="counted has no token of answer 0"):
        TokenQuantile().score(answers._replace(counted=counted & (p == 0.2)))
    with pytest.raises(ValueError, match="TokenQuantile.quantile is 1.5"):
        TokenQuantile(quantile=1.5)


def test_agreement_is_the_share_of_the_most_frequent_vote():
    votes = np.array([[1, 1, 2, 1], [3, 4, 5, 6]])
    np.testing.assert_allclose(Agreement().score(Answers(NOTHING, votes=votes)), [0.75, 0.25])


@pytest.mark.parametrize(
    "rule", [MaxProbability(), Entropy(), TokenQuantile(), Agreement()], ids=lambda r: type(r).__name__
)
def test_answers_that_lack_what_a_rule_needs_are_refused(rule):
    with pytest.raises(ValueError, match=rf"answers\.\w+ is None; {type(rule).__name__} needs it"):
        rule.score(Answers(NOTHING))


def data(rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, 3)) * [1, 10, 0.1] + [0, 5, -2]
    return features, features @ [2, -0.1, 5] + 10 + rng.logistic(size=rows) > 0


def test_a_learned_rule_is_the_minimum_that_scipy_finds():
    features, good = data()
    z = (features - features.mean(axis=0)) / features.std(axis=0)

    def loss(w):
        logit = z @ w[:3] + w[3]
        return (np.logaddexp(0, logit) - good * logit).mean() + 0.5e-3 * (w[:3] ** 2).sum()

    best = optimize.minimize(loss, np.zeros(4), tol=1e-12)
    rule = fit_deferral(features, good)
    expected = 1 / (1 + np.exp(-(z @ best.x[:3] + best.x[3])))
    np.testing.assert_allclose(rule.score(Answers(good * 1, features=features)), expected, atol=1e-4)
    assert fit_deferral(features, good) == rule


def test_separable_and_constant_features_still_have_a_rule():
    x = np.stack([np.linspace(-1, 1, 40), np.ones(40)], axis=1)
    rule = fit_deferral(x, x[:, 0] > 0)
    score = rule.score(Answers(np.zeros(40), features=x))
    assert ((score > 0.5) == (x[:, 0] > 0)).all()
    assert np.isfinite(rule.weights).all()


def test_bad_data_of_a_learned_rule_are_refused():
    features, good = data(20)
    with pytest.raises(ValueError, match="good is True for every row"):
        fit_deferral(features, np.ones(20, bool))
    with pytest.raises(ValueError, match="not finite"):
        fit_deferral(features * np.inf, good)
    with pytest.raises(ValueError, match="ridge is 0.0"):
        fit_deferral(features, good, ridge=0.0)
    with pytest.raises(ValueError, match="answers.features is 3 a row; LearnedDeferral was fitted on 1 a row"):
        LearnedDeferral(weights=(1.0,), bias=0.0).score(Answers(good * 1, features=features))
