"""The acceptance of drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import accept_greedy, accept_sampled, predicted_speedup, tokens_per_round

DRAFT = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.1, 0.7]])
FULL = np.array([[0.2, 0.3, 0.1, 0.4], [0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])


def test_greedy_keeps_the_leading_matches_and_adds_the_full_models_own() -> None:
    drafted = jnp.array([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    found = accept_greedy(drafted, jnp.array([[1, 2, 3, 4]] * 3))
    assert found.count.tolist() == [3, 1, 0] and found.token.tolist() == [4, 2, 1]


def test_rows_that_drafted_less_keep_no_more() -> None:
    drafted = jnp.array([[1, 2, 3]] * 4)
    found = accept_greedy(drafted, jnp.array([[1, 2, 3, 4]] * 4), jnp.array([3, 2, 1, 0]))
    assert found.count.tolist() == [3, 2, 1, 0] and found.token.tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize("length", [0, 1])
def test_behind_a_short_draft_the_full_model_draws_by_itself(length: int) -> None:
    _, kept, token = draws(20_000, length)
    assert kept.max() == length
    last = token[kept == length]
    shares = np.bincount(last, minlength=4) / len(last)
    assert np.abs(shares - FULL[length]).max() < 4 * 0.5 / len(last) ** 0.5


def draws(count: int, length: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drafted tokens, kept counts and what follows, many times; all are drafted, or so many of them."""
    keys = jax.random.split(jax.random.key(0), count)
    drafted = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(jnp.asarray(DRAFT))))(keys)
    shape = (count, *DRAFT.shape)
    draft, full = jnp.broadcast_to(jnp.asarray(DRAFT, jnp.float32), shape), jnp.asarray(FULL, jnp.float32)
    full = jnp.broadcast_to(full, (count, *FULL.shape))
    lengths = None if length is None else jnp.full(count, length)
    found = jax.jit(accept_sampled)(drafted, draft, full, jax.random.split(jax.random.key(1), count), lengths)
    return np.asarray(drafted), np.asarray(found.count), np.asarray(found.token)


def test_every_token_has_the_full_models_distribution() -> None:
    count = 40_000
    drafted, kept, token = draws(count)
    first = np.where(kept > 0, drafted[:, 0], token)
    shares = np.bincount(first, minlength=4) / count
    assert np.abs(shares - FULL[0]).max() < 4 * 0.5 / count**0.5
    went_on = kept >= 1
    second = np.where(kept > 1, drafted[:, 1], token)[went_on]
    shares = np.bincount(second, minlength=4) / went_on.sum()
    assert np.abs(shares - FULL[1]).max() < 4 * 0.5 / went_on.sum() ** 0.5
    third = token[kept == 2]
    assert np.abs(np.bincount(third, minlength=4) / len(third) - FULL[2]).max() < 4 * 0.5 / len(third) ** 0.5
    assert (kept >= 1).mean() == pytest.approx(np.minimum(DRAFT[0], FULL[0]).sum(), abs=0.02)


def test_equal_distributions_keep_all_and_disjoint_ones_nothing() -> None:
    keys = jax.random.split(jax.random.key(0), 8)
    half = jnp.array([0.5, 0.5, 0.0, 0.0])
    other = half[::-1]
    drafted = jnp.zeros((8, 1), jnp.int32)
    same = accept_sampled(drafted, jnp.tile(half, (8, 1, 1)), jnp.tile(half, (8, 2, 1)), keys)
    assert (same.count == 1).all() and (same.token < 2).all()
    none = accept_sampled(drafted, jnp.tile(half, (8, 1, 1)), jnp.tile(other, (8, 2, 1)), keys)
    assert (none.count == 0).all() and (none.token >= 2).all()


def test_the_papers_formulas() -> None:
    assert tokens_per_round(0.5, 2) == pytest.approx((1 - 0.5**3) / (1 - 0.5))
    assert tokens_per_round(1.0, 4) == 5
    assert predicted_speedup(0.8, 3, 0.25) == pytest.approx((1 - 0.8**4) / (1 - 0.8) / 1.75)
