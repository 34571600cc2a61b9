import json
import math

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dynamoe.experiments.data import Bytes, Mixture, held_out, target_mask, training_batches

TEXT = tuple(f"<{i}> " + "lorem ipsum " * (i % 5) for i in range(60))
OTHER = tuple(f"[{i}] other" for i in range(50))


@pytest.fixture(params=["random access", "streaming", "mixture", "streaming mixture"])
def source(request, in_memory):
    first = in_memory(train=TEXT, streaming="streaming" in request.param)
    if "mixture" not in request.param:
        return first
    return Mixture(sources=(first, in_memory(train=OTHER)), weights=(2.0, 1.0))


def make(source, **changes):
    return training_batches(source, Bytes(), **{"batch_size": 8, "sequence_length": 16, "seed": 3, **changes})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, other)


def test_batches_are_int32_windows(source):
    batch = next(make(source))
    assert [(field.shape, field.dtype) for field in batch] == [((8, 17), np.dtype(np.int32))] * 4
    assert target_mask(batch).any()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_position_is_exact_within_and_across_rounds(source, prefetch):
    batches = make(source, prefetch=prefetch)
    for _ in range(6):  # eighteen batches; a round through TEXT has fourteen
        state = json.loads(json.dumps(batches.get_state()))
        expected = take(batches, 3)
        resumed = make(source, prefetch=prefetch)
        resumed.set_state(state)
        assert_same(take(resumed, 3), expected)


def test_going_back_on_the_same_iterator_is_exact(source):
    batches = make(source)
    next(batches)
    state = batches.get_state()
    expected = take(batches, 5)
    batches.set_state(state)
    assert_same(take(batches, 5), expected)


def test_orbax_keeps_the_position(source, tmp_path):
    batches, resumed = make(source), make(source)
    take(batches, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert_same(take(resumed, 3), take(batches, 3))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_same_global_batches(source, process_count):
    whole = make(source)
    shares = np.arange(8).reshape(process_count, -1)
    parts = [make(source, rows=share) for share in shares]
    for _ in range(4):
        shards = [next(part) for part in parts]
        assert {shard.tokens.shape for shard in shards} == {(8 // process_count, 17)}
        joined = [np.concatenate(columns) for columns in zip(*shards, strict=True)]
        assert_same([joined], [next(whole)])


def test_a_position_fits_any_number_of_processes(source):
    whole = make(source)
    parts = [make(source, rows=rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 5])]
    for batches in (whole, *parts):
        take(batches, 5)
    assert all(part.get_state() == whole.get_state() for part in parts)
    resumed = make(source, rows=[2, 7])
    resumed.set_state(parts[0].get_state())
    for batch, expected in zip(take(resumed, 3), take(whole, 3), strict=True):
        np.testing.assert_array_equal(batch.tokens, expected.tokens[[2, 7]])


def test_each_round_holds_every_window_once_in_its_own_order(in_memory):
    source = in_memory(train=("".join(map(chr, range(32, 127))),))  # 97 tokens: 12 windows of 8+1
    batches = make(source, batch_size=3, sequence_length=8)
    first, second = ([row.tobytes() for batch in take(batches, 4) for row in batch.tokens] for _ in range(2))
    assert len(set(first)) == 12 and set(first) == set(second) and first != second


def test_seeds_give_different_orders_and_repeat(source):
    first, again, other = (next(make(source, seed=seed)).tokens for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_held_out_text_counts_bytes_and_targets_by_hand(in_memory):
    source = in_memory(train=("x",), validation=("a\u00e4", "bcd", "e" * 50))
    text = held_out(source, Bytes(), batch_size=2, sequence_length=4, max_bytes=6)
    # 256 a C3 A4 257 | 256 b c d 257: ten tokens, three windows; targets are six bytes and two eos
    assert text[1:] == (6, 2, 8)
    assert [batch.tokens.shape for batch in text.batches] == [(2, 5), (2, 5)]
    assert [row.tolist() for row in text.batches[1].segments] == [[1, 1, 0, 0, 0], [0] * 5]
    assert sum(int(target_mask(batch).sum()) for batch in text.batches) == text.tokens


def test_uniform_model_scores_the_bits_that_arithmetic_says(in_memory):
    text = held_out(in_memory(train=("x",), validation=("abcd",)), Bytes(), batch_size=1, sequence_length=8)
    nats = text.tokens * math.log(258)
    assert nats / math.log(2) / text.bytes == pytest.approx(5 / 4 * math.log2(258))


def test_held_out_text_is_one_document_at_least(in_memory):
    source = in_memory(train=("x",), validation=("abcdef", "g"))
    assert held_out(source, Bytes(), batch_size=1, sequence_length=4, max_bytes=1).bytes == 6
    assert held_out(source, Bytes(), batch_size=1, sequence_length=4).bytes == 7


def test_held_out_text_is_the_same_every_time(in_memory):
    source = in_memory(train=("x",), validation=TEXT)
    first, second = (held_out(source, Bytes(), batch_size=4, sequence_length=16) for _ in range(2))
    assert_same(first.batches, second.batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: allowed are 1 and above"),
        ({"sequence_length": 0}, "sequence_length=0: allowed are 1 and above"),
        ({"seed": -1}, r"seed=-1: allowed are 0 to 2\*\*32 - 1"),
        ({"prefetch": -1}, "prefetch=-1: allowed are 0 and above"),
        ({"rows": []}, r"rows=\[\]: expected numbers from 0 to batch_size - 1 = 7"),
        ({"rows": [0, 8]}, r"rows=\[0, 8\]: expected numbers from 0 to batch_size - 1 = 7"),
        ({"rows": [-1]}, r"rows=\[-1\]: expected numbers from 0 to batch_size - 1 = 7"),
    ],
)
def test_wrong_numbers_are_refused(in_memory, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(in_memory(train=TEXT), **changes)


def test_empty_training_text_is_an_error(in_memory):
    with pytest.raises(ValueError, match="has 0 documents with 0 tokens; sequence_length=16 needs at least 17"):
        make(in_memory(train=()))


def test_training_text_shorter_than_a_window_is_an_error(in_memory):
    make(in_memory(train=("x" * 15,)))
    with pytest.raises(ValueError, match="has 1 documents with 16 tokens; sequence_length=16 needs at least 17"):
        make(in_memory(train=("x" * 14,)))


def test_empty_validation_text_is_an_error(in_memory):
    with pytest.raises(ValueError, match="validation split has 0 documents with 0 tokens"):
        held_out(in_memory(train=TEXT), Bytes(), batch_size=1, sequence_length=4)
    with pytest.raises(ValueError, match="max_bytes=0: allowed are 1 and above, or None"):
        held_out(in_memory(train=TEXT, validation=TEXT), Bytes(), batch_size=1, sequence_length=4, max_bytes=0)
