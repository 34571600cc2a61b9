"""Filters and samplers: what transformers' processors do, by hand and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models.generation import (
    Categorical,
    Greedy,
    MinPTokens,
    RepetitionPenalty,
    Temperature,
    TopKTokens,
    TopPTokens,
)

# Of logarithms, so that the probabilities can be read off: 0.5, 0.25, 0.125, 0.1, 0.025.
PROBABILITIES = np.array([0.1, 0.5, 0.025, 0.25, 0.125])
LOGITS = jnp.asarray(np.log(PROBABILITIES)[None], jnp.float32)
ALL = set(range(5))


def kept(filter, logits=LOGITS):
    found = np.asarray(filter(logits, jnp.zeros(logits.shape, bool)))
    assert (found[np.isfinite(found)] == np.asarray(logits)[np.isfinite(found)]).all()
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in found]


@pytest.mark.parametrize(("k", "tokens"), [(1, {1}), (2, {1, 3}), (4, {0, 1, 3, 4}), (5, ALL), (9, ALL)])
def test_top_k_keeps_the_k_most_likely(k, tokens):
    assert kept(TopKTokens(k=k)) == [tokens]


def test_top_k_keeps_those_as_likely_as_the_kth():
    assert kept(TopKTokens(k=2), jnp.array([[1.0, 2.0, 1.0, 0.0]])) == [{0, 1, 2}]


@pytest.mark.parametrize(
    ("p", "tokens"),
    # The most likely token alone has 0.5; a token goes where those less likely and it hold at most 1 - p.
    [
        (0.01, {1}),
        (0.45, {1}),
        (0.55, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {1, 3, 4}),
        (0.9, {0, 1, 3, 4}),
        (1.0, ALL),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p, tokens):
    assert kept(TopPTokens(p=p)) == [tokens]


@pytest.mark.parametrize(
    ("p", "tokens"),
    [(0.04, ALL), (0.06, {0, 1, 3, 4}), (0.21, {1, 3, 4}), (0.49, {1, 3}), (0.51, {1}), (1.0, {1})],
)
def test_min_p_keeps_tokens_of_at_least_p_times_the_largest_probability(p, tokens):
    assert kept(MinPTokens(p=p)) == [tokens]


def test_rows_are_filtered_each_by_itself():
    rows = jnp.concatenate([LOGITS, LOGITS[:, ::-1]])
    for filter in (TopKTokens(k=2), TopPTokens(p=0.7), MinPTokens(p=0.3)):
        first, second = kept(filter, rows)
        assert second == {4 - token for token in first} == {3, 1}


def test_a_repetition_penalty_makes_both_signs_less_likely_and_leaves_others_alone():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(RepetitionPenalty(penalty=4.0)(logits, seen), [[0.5, -8.0, 2.0, -2.0]])
    assert RepetitionPenalty().needs_seen and Greedy(filters=(RepetitionPenalty(),)).needs_seen
    assert not Categorical(filters=(TopKTokens(),)).needs_seen


def in_float64(logits, seen, *, penalty, temperature, top_k, top_p, min_p):
    """transformers' processors, one after the other, by the probabilities."""
    logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits) / temperature
    logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    order = np.argsort(logits)
    cumulative = np.cumsum(np.exp(logits[order]) / np.exp(logits).sum())
    removed = cumulative <= 1 - top_p
    removed[-1] = False
    logits[order[removed]] = -np.inf
    probabilities = np.exp(logits) / np.exp(logits).sum()
    return np.where(probabilities < min_p * probabilities.max(), -np.inf, logits)


def test_composed_filters_are_those_of_transformers_one_after_the_other():
    draw = np.random.default_rng(0)
    logits, seen = draw.normal(size=(20, 64)) * 2, draw.random((20, 64)) < 0.2
    filters = (
        RepetitionPenalty(penalty=1.3),
        Temperature(value=0.7),
        TopKTokens(k=20),
        TopPTokens(p=0.85),
        MinPTokens(p=0.06),
    )
    found = jnp.asarray(logits, jnp.float32)
    for filter in filters:
        found = filter(found, jnp.asarray(seen))
    for row in range(20):
        numbers = {"penalty": 1.3, "temperature": 0.7, "top_k": 20, "top_p": 0.85, "min_p": 0.06}
        np.testing.assert_allclose(found[row], in_float64(logits[row], seen[row], **numbers), rtol=1e-5)


def test_greedy_takes_the_most_likely_token_and_the_first_among_equals():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = jnp.array([[0.0, 3.0, 3.0], [1.0, -jnp.inf, 0.0]])
    np.testing.assert_array_equal(Greedy()(logits, None, keys), [1, 0])


def test_categorical_draws_from_the_softmax_each_row_by_its_own_key():
    keys = jax.random.split(jax.random.key(4), 4_000)
    sampler = Categorical(filters=(Temperature(value=2.0), TopKTokens(k=3)))
    drawn = np.asarray(jax.jit(sampler)(jnp.broadcast_to(LOGITS, (4_000, 5)), None, keys))
    expected = np.where(PROBABILITIES < 0.125, 0, PROBABILITIES**0.5)
    # The standard error of a share is at most 0.008.
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4_000, expected / expected.sum(), atol=0.03)
    np.testing.assert_array_equal(sampler(LOGITS, None, keys[7:8]), drawn[7:8])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Temperature(value=0.0), r"Temperature.value is 0\.0; it must be above 0 and finite"),
        (lambda: Temperature(value=float("nan")), "Temperature.value is nan"),
        (lambda: TopKTokens(k=0), "TopKTokens.k is 0; it must be at least 1"),
        (lambda: TopPTokens(p=0.0), r"TopPTokens.p is 0\.0; it must be above 0 and at most 1"),
        (lambda: TopPTokens(p=1.1), r"TopPTokens.p is 1\.1"),
        (lambda: MinPTokens(p=-0.1), r"MinPTokens.p is -0\.1; it must be above 0 and at most 1"),
        (lambda: RepetitionPenalty(penalty=0.0), r"RepetitionPenalty.penalty is 0\.0; it must be above 0 and finite"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_no_filter_is_refused(unchecked):
    with pytest.raises(ValueError, match="Greedy.filters holds 0.8; it must hold filters"):
        Greedy(filters=(0.8,))  # pyright: ignore[reportArgumentType]
