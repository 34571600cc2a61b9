"""Which stage is called next."""

import pytest

from dynamoe.dynamic import DepthQueue


def test_the_deepest_full_stage_comes_first() -> None:
    queue = DepthQueue(stages=3, width=2)
    queue.add(0, [1, 2, 3])
    queue.add(1, [4, 5])
    queue.add(2, [6])
    assert queue.full and queue.next() == (1, [4, 5])
    assert queue.full and queue.next() == (0, [1, 2])
    assert not queue.full


def test_where_none_is_full_the_fullest_comes_first_and_among_equals_the_deepest() -> None:
    queue = DepthQueue(stages=3, width=4)
    queue.add(0, [1, 2])
    queue.add(1, [3])
    queue.add(2, [4])
    assert [queue.next() for _ in range(3)] == [(0, [1, 2]), (2, [4]), (1, [3])]
    assert queue.empty


def test_rows_that_go_together_go_to_the_end_first() -> None:
    queue = DepthQueue(stages=2, width=4, together=True)
    queue.add(0, [1, 2, 3])
    queue.add(1, [4])
    assert queue.next() == (1, [4])


def test_a_row_can_be_taken_out() -> None:
    queue = DepthQueue(stages=2, width=4)
    queue.add(1, [4, 5])
    queue.remove(4)
    queue.remove(9)
    assert queue.next() == (1, [5])
    with pytest.raises(ValueError, match="the queue is empty"):
        queue.next()


def test_every_row_has_its_turn() -> None:
    queue, seen = DepthQueue(stages=2, width=2), []
    queue.add(0, range(7))
    while not queue.empty:
        stage, rows = queue.next()
        if stage == 0:
            queue.add(1, rows)
        else:
            seen += rows
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(("stages", "width", "name"), [(0, 1, "stages"), (1, 0, "width")])
def test_refuses_with_the_name_and_what_is_allowed(stages: int, width: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        DepthQueue(stages, width)
