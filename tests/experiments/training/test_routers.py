"""What the routers do with a text: float64 over every token's routing, however the text is batched."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.experiments.data import HeldOut, held_out
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.training.restore import Trained, as_trained
from dynamoe.experiments.training.routers import RouterStatistics, entropy_share, measure_routers, router_history
from dynamoe.experiments.training.routing_counts import Seen, Tally, index_text, watch
from dynamoe.experiments.training.step import Trainer, build_trainer
from dynamoe.models import Decoder, Dense, EveryNth, Layout, MeshShape
from dynamoe.moe import CapacityDispatcher, MoE, Routing, SwiGLU, TopK

CROWDED = EveryNth(
    ffn=MoE(
        experts=4,
        router=TopK(k=2),
        expert=SwiGLU(hidden=16),
        dispatcher=CapacityDispatcher(capacity_factor=0.5, routing_group=4),
    ),
    otherwise=Dense(hidden=16),
)


def trainer_of(experiment: Experiment) -> Trainer:
    layout = Layout(MeshShape(data=1).build(jax.devices()[:1]))
    return build_trainer(experiment.model, experiment.optimizer, layout, steps=1)


class Routed(NamedTuple):
    trained: Trained
    text: HeldOut
    found: list[RouterStatistics]


@pytest.fixture(scope="module")
def routed(tiny: Callable[..., Experiment]) -> Routed:
    """Layers 1 and 3 of four route, with places for half of the assignments; the last batch is mostly padding."""
    experiment = tiny(model=dataclasses.replace(tiny().model, layers=4, ffn=CROWDED))
    trainer = trainer_of(experiment)
    state = trainer.init(jnp.uint32(0))
    trained = as_trained(experiment, trainer, state.params, state.variables, 0)
    text = held_out(experiment.source, experiment.tokenizer, batch_size=7, sequence_length=16)
    return Routed(trained, text, measure_routers(trained, text))


def test_equals_float64_over_every_tokens_routing(routed: Routed) -> None:
    trained, text = routed.trained, routed.text
    keep = lambda path, activations, routing: None if routing is None else (routing.expert, routing.probs)  # noqa: E731
    forward = jax.jit(lambda *inputs: trained.model(*inputs, tap=keep)[1:])
    real = [(batch.segments[:, :-1] > 0).reshape(-1) for batch in text.batches]
    assert real[-1].sum() < 0.8 * real[0].sum()  # or a plain mean over batches would do as well
    outputs = [forward(*batch.inputs) for batch in text.batches]
    assert [of.layer for of in routed.found] == [1, 3]
    for of in routed.found:
        taps = [output[1][f"layers.{of.layer}.ffn"] for output in outputs]
        experts = np.concatenate([np.asarray(expert) for expert, _ in taps])
        probs = np.concatenate(
            [np.asarray(probs, np.float64)[mask] for (_, probs), mask in zip(taps, real, strict=True)]
        )
        counts = np.bincount(experts, minlength=5)[:4]
        assert counts.sum() == 2 * sum(mask.sum() for mask in real)
        np.testing.assert_allclose(of.load, counts / counts.sum(), rtol=1e-12)
        np.testing.assert_allclose(of.importance, probs.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(of.entropy, -(probs * np.log(probs)).sum(axis=1).mean(), rtol=1e-5)
        np.testing.assert_allclose(of.max_violation, counts.max() / counts.mean() - 1, rtol=1e-9)
        lost = sum(
            float(output[0][of.layer].dropped) * (np.asarray(expert) < 4).sum()
            for output, (expert, _) in zip(outputs, taps, strict=True)
        )
        np.testing.assert_allclose(of.dropped, lost / counts.sum(), rtol=1e-5)
        assert 0.1 < of.dropped < 0.9


def test_counts_equal_a_loop_over_every_token(routed: Routed) -> None:
    trained, text = routed.trained, routed.text
    keep = lambda path, activations, routing: None if routing is None else routing.expert  # noqa: E731
    forward = jax.jit(lambda *inputs: trained.model(*inputs, tap=keep).taps)
    taps = [forward(*batch.inputs) for batch in text.batches]
    ids = [int(i) for batch in text.batches for i in batch.tokens[:, :-1][batch.segments[:, :-1] > 0]]
    for of in routed.found:
        assert of.counts is not None
        chosen = np.concatenate([np.asarray(tap[f"layers.{of.layer}.ffn"]).reshape(-1, 2) for tap in taps])
        chosen = chosen[chosen[:, 0] < 4]  # padding goes to nobody
        together, halves = np.zeros((4, 4), int), np.zeros((2, 4), int)
        by_id = {token: np.zeros(4, int) for token in set(ids)}
        for place, (token, experts) in enumerate(zip(ids, chosen, strict=True)):
            for one in experts:
                by_id[token][one] += 1
                halves[place * 10 // len(ids) % 2, one] += 1
                for other in experts:
                    together[one, other] += 1
        np.testing.assert_array_equal(of.counts.together, together)
        np.testing.assert_array_equal(of.counts.halves, halves)
        assert of.counts.tokens == len(ids) and set(of.counts.ids.tolist()) == set(ids)
        for token, occurrences, row in zip(of.counts.ids, of.counts.occurrences, of.counts.by_id, strict=True):
            assert occurrences == ids.count(token)
            np.testing.assert_array_equal(row, by_id[token])
        assert sorted(of.counts.occurrences, reverse=True) == of.counts.occurrences.tolist()


def test_of_too_many_token_ids_the_most_frequent_are_counted(routed: Routed) -> None:
    index = index_text(routed.text, most=2)
    every = index_text(routed.text, most=1000)
    np.testing.assert_array_equal(index.ids, every.ids[:2])
    tally = Tally(index, experts=3)
    windows = jax.tree.map(lambda array: array[:1, :4], routed.text.batches[0])._replace(
        tokens=np.array([[index.ids[1], every.ids[2], index.ids[0], 0]], np.int32)
    )
    # Two flat assignments of token 0, one of token 1 (not counted by id), one of token 2, one to nobody.
    seen = Seen(np.array([2, 0, 1, 2, 3]), np.array([0, 0, 1, 2, 2]), np.zeros((3, 3), int))
    assert tally.add(windows, 0, seen) == 4
    np.testing.assert_array_equal(tally.counts().by_id, [[0, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(tally.counts().halves.sum(axis=0), [1, 1, 2])


def test_padding_is_left_out_whatever_the_router_does_there() -> None:
    probs = jnp.full((3, 2), 0.5)
    routing = Routing(jnp.array([0, 1, 1]), jnp.ones(3), None, probs, probs)
    seen = watch(jnp.array([True, True, False]))("ffn", probs, routing)
    assert isinstance(seen, Seen)
    np.testing.assert_array_equal(seen.expert, [0, 1, 2])
    np.testing.assert_array_equal(seen.together, [[1, 0], [0, 1]])


def test_a_model_without_routers_is_refused_before_it_computes(
    tiny: Callable[..., Experiment], dense_model: Decoder
) -> None:
    experiment = tiny(model=dense_model)
    trainer = trainer_of(experiment)
    shapes = trainer.abstract_state
    text = held_out(experiment.source, experiment.tokenizer, batch_size=1, sequence_length=16)
    with pytest.raises(ValueError, match=r"the model has no routers, its networks are Dense\(hidden=32"):
        measure_routers(as_trained(experiment, trainer, shapes.params, shapes.variables, 0), text)


def test_entropy_is_a_share_of_its_largest_value() -> None:
    assert entropy_share(np.log(8) / 2, 8) == pytest.approx(0.5)
    assert np.isnan(entropy_share(0.0, 1))


def test_history_is_read_by_layer_over_the_steps(tmp_path: Path) -> None:
    def figures(layer: int, load: list[float], entropy: float) -> dict[str, object]:
        of = {"load": load, "importance": load[::-1], "entropy": entropy, "max_violation": 0.5, "dropped": 0.25}
        return {f"layers.{layer}.{name}": value for name, value in of.items()}

    lines = [
        {"step": 1, "split": "train", "loss": 1.0},
        {"step": 1, "split": "routers", **figures(10, [0.5, 0.5], 0.7), **figures(2, [0.5, 0.25, 0.25], 1.0)},
        {"step": 4, "split": "routers", **figures(10, [0.75, 0.25], 0.6), **figures(2, [0.25, 0.5, 0.25], 0.9)},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = router_history(tmp_path)
    assert list(history) == [2, 10]
    np.testing.assert_array_equal(history[10].steps, [1, 4])
    np.testing.assert_array_equal(history[10].load, [[0.5, 0.5], [0.75, 0.25]])
    np.testing.assert_array_equal(history[2].importance, [[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]])
    np.testing.assert_array_equal(history[2].entropy, [1.0, 0.9])
    last = history[10].at(10, -1)
    assert (last.layer, last.entropy, last.max_violation, last.dropped) == (10, 0.6, 0.5, 0.25)


def test_a_run_that_logged_no_routers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    with pytest.raises(ValueError, match="nothing was logged about routers; its model has none, or an older version"):
        router_history(tmp_path)
