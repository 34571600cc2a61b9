"""Hash routing: tables by hand and by count, and what a user's own table may be."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import Hash, HashTable, RandomTable, RouterState, RoutingContext, balanced_table
from dynamoe.moe.routing import NO_CONTEXT

D = 8
X = jnp.ones((4, D))
ROWS = ((2, 0), (1, 2), (0, 1), (2, 1), (0, 2))


# What a recipe may write: a table of its own, here spelled out, in earnest counted over a corpus.
@dataclass(frozen=True, kw_only=True)
class Spelled(HashTable):
    rows: tuple[tuple[int, ...], ...] = ROWS

    def build(self, *, vocab, experts, k, key):
        return np.array(self.rows, np.int32)


def build(experts=3, **options):
    return Hash(**options).build(width=D, experts=experts, key=jax.random.key(1))


def test_a_token_goes_where_the_table_says():
    router = build(vocab=5, k=2, table=Spelled())
    routing, state = router(X, RoutingContext(token_ids=jnp.array([3, 0, 3, 4])))
    assert state is None and routing.token is None
    np.testing.assert_array_equal(routing.expert, [2, 1, 2, 0, 2, 1, 0, 2])
    np.testing.assert_array_equal(routing.weight, [0.5] * 8)
    np.testing.assert_array_equal(routing.probs, [[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0, 0.5]])
    np.testing.assert_array_equal(routing.logits, np.zeros((4, 3)))


def test_what_the_activations_are_plays_no_part():
    router, context = build(vocab=5), RoutingContext(token_ids=jnp.array([3, 0, 3, 4]))
    one, other = (router(x, context)[0] for x in (X, 7 * X))
    np.testing.assert_array_equal(one.expert, other.expert)


def test_an_id_outside_of_the_vocabulary_goes_to_nobody():
    routing, _ = build(vocab=5, table=RandomTable())(X, RoutingContext(token_ids=jnp.array([5, -1, 4, 100])))
    np.testing.assert_array_equal(np.asarray(routing.expert) == 3, [True, True, False, True])
    np.testing.assert_array_equal(routing.weight, [0, 0, 1, 0])


@pytest.mark.parametrize(("vocab", "experts", "k"), [(24, 4, 3), (7, 3, 2), (2, 5, 2)])
def test_a_random_table_deals_the_ids_out_evenly(vocab, experts, k):
    table = RandomTable().build(vocab=vocab, experts=experts, k=k, key=jax.random.key(4))
    assert table.shape == (vocab, k) and all(len(set(row)) == k for row in np.asarray(table).tolist())
    counts = np.bincount(np.ravel(table), minlength=experts)
    # The last ids, fewer than there are experts, cannot be dealt out evenly.
    assert counts.min() >= vocab // experts * k and counts.max() <= -(-vocab // experts) * k


def test_random_tables_differ_by_key_and_keep_different_company():
    one, other = (RandomTable().build(vocab=64, experts=8, k=2, key=jax.random.key(key)) for key in (0, 1))
    assert (one != other).mean() > 0.5
    assert len({tuple(sorted(row)) for row in np.asarray(one).tolist()}) > 8


def test_a_balanced_table_by_hand():
    # From the most frequent: id 1 (9) to expert 0, id 3 (5) to expert 1, id 0 (4) to expert 1, which has fewer, now 9.
    # Id 4 (2) finds 9 and 9: expert 0 has fewer ids. Id 2 (0) goes to expert 1, with 9 against 11.
    np.testing.assert_array_equal(balanced_table([4, 9, 0, 5, 2], 2), [[1], [0], [1], [1], [0]])


def test_a_balanced_table_of_zipfian_counts_is_even_where_a_random_one_is_not():
    counts = 100_000 // np.arange(20, 520)

    def busiest_over_mean(table):
        load = np.bincount(np.ravel(table), weights=np.repeat(counts, table.shape[1]), minlength=8)
        return load.max() / load.mean()

    for k in (1, 2):
        assert busiest_over_mean(balanced_table(counts, 8, k)) < 1.01
        random = RandomTable().build(vocab=500, experts=8, k=k, key=jax.random.key(0))
        assert busiest_over_mean(np.asarray(random)) > 1.05


def test_ids_that_the_corpus_lacks_are_dealt_out_too():
    table = balanced_table(np.zeros(12, int), 4, 2)
    np.testing.assert_array_equal(np.bincount(table.ravel()), [6, 6, 6, 6])


def test_a_table_may_be_replaced():
    router = build(vocab=5)
    router.table[...] = jnp.asarray(balanced_table([4, 9, 0, 5, 2], 2))
    routing, _ = router(X, RoutingContext(token_ids=jnp.array([0, 1, 2, 4])))
    np.testing.assert_array_equal(routing.expert, [1, 0, 1, 0])


def test_layers_have_tables_of_their_own_and_a_users_is_the_same_in_all():
    # Built as models.layers builds stacked layers: all at once, one key each.
    def tables(table):
        def state(key):
            return nnx.state(Hash(vocab=5, k=2, table=table).build(width=D, experts=3, key=key), RouterState)

        return np.asarray(jax.vmap(state)(jax.random.split(jax.random.key(0), 2))["table"][...])

    np.testing.assert_array_equal(tables(Spelled()), [ROWS, ROWS])
    one, other = tables(RandomTable())
    assert (one != other).any()


def test_without_token_ids_it_refuses():
    with pytest.raises(ValueError, match=r"context\.token_ids is None; a hash router needs the token ids"):
        build(vocab=5)(X, NO_CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 0}, r"Hash\.vocab is 0; it must be at least 1"),
        ({"k": 0}, r"Hash\.k is 0; it must be at least 1"),
        ({"k": 4}, r"Hash\.k is 4; with 3 experts it must be at most 3"),
        ({"vocab": 6, "k": 2, "table": Spelled()}, r"Spelled.* built int32\[5, 2\]; it must be int32\[6, 2\]"),
        (
            {"vocab": 1, "k": 2, "table": Spelled(rows=((0, 3),))},
            r"which built experts from 0 to 3; allowed are 0 to 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), r"counts have shape \(0,\); there must be one per token id"),
        (([1, -1], 2), r"none below 0"),
        (([1, 1], 2, 3), r"k is 3; with 2 experts it must be from 1 to 2"),
    ],
)
def test_counts_that_make_no_table_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        balanced_table(*arguments)
