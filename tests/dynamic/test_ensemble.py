"""An ensemble's votes by hand, and its place in a cascade."""

import numpy as np
import pytest

from dynamoe.dynamic import Agreement, Answers, Buckets, Cascade, Ensemble

VOTES = np.array([[1, 1, 2], [3, 4, 3], [5, 6, 7], [8, 8, 8]])


class Column:
    """Answers with a column of its input."""

    def __init__(self, column: int, cost: float = 1.0):
        self.name, self.column, self.cost = f"column {column}", column, cost

    def __call__(self, inputs):
        return Answers(inputs[:, self.column])


def test_the_most_frequent_vote_wins_and_of_equals_the_earlier_members():
    ensemble = Ensemble(name="three", members=(Column(0), Column(1), Column(2)))
    answers = ensemble(VOTES)
    np.testing.assert_array_equal(answers.prediction, [1, 3, 5, 8])
    np.testing.assert_array_equal(answers.votes, VOTES)
    assert ensemble.cost == 3.0


def test_a_cascade_hands_on_what_members_do_not_agree_on():
    ensemble = Ensemble(name="three", members=(Column(0), Column(1), Column(2)))
    cascade = Cascade(
        models=(ensemble, Column(2, 10.0)), rules=(Agreement(),), unit="FLOPs", buckets=Buckets(smallest=2)
    )
    found = cascade.run(VOTES, (0.6,))
    np.testing.assert_array_equal(found.prediction, [1, 3, 7, 8])
    assert (found.rows, found.cost) == ([4, 1], 3.0 + 10 / 4)


def test_a_single_member_and_answers_of_many_tokens_are_refused():
    with pytest.raises(ValueError, match="Ensemble.members has 1; agreement takes two or more"):
        Ensemble(name="one", members=(Column(0),))
    with pytest.raises(ValueError, match="members of two answer in the shape"):
        Ensemble(name="two", members=(Column(0), Column(1)))(VOTES[:, :, None])
