"""Training classifiers: losses against NumPy, runs that stop and continue, augmentation, sweeps."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Buckets, DepthWeighted, Exits, OwnHead, SelfDistilled, Top2Gap
from dynamoe.experiments.classification import ClassificationExperiment, RandomShift, WordDropout
from dynamoe.experiments.classification.exit_sweep import (
    at_exits,
    calibrate,
    exit_flops,
    plain_flops,
    policy_record,
    sweep,
)
from dynamoe.experiments.classification.experiment import check_fits
from dynamoe.experiments.classification.task import classification_task
from dynamoe.experiments.classification.train import load_classifier, train_classifier
from dynamoe.experiments.data.examples import Examples
from dynamoe.experiments.data.images import Digits
from dynamoe.experiments.optimizers import AdamW
from dynamoe.experiments.training import loop
from dynamoe.models import Attention, Dense, TextClassifier, VisionTransformer
from dynamoe.moe import DenseDispatcher, MoE, SwiGLU

MODEL = VisionTransformer(
    image=(8, 8, 1),
    patch=4,
    width=16,
    layers=2,
    attention=Attention(heads=2),
    ffn=Dense(hidden=16),
    exits=Exits(after=(1,), head=OwnHead()),
)
TINY = ClassificationExperiment(
    model=MODEL,
    augmentation=RandomShift(most=1),
    optimizer=AdamW(learning_rate=1e-2),
    steps=4,
    batch_size=16,
    evaluate_every=2,
    checkpoint_every=2,
    log_every=1,
)
DIGITS = Digits().examples("test")
FEW = Examples(DIGITS.inputs[:12], np.where(np.arange(12) < 10, DIGITS.labels[:12], -1).astype(np.int32))


@pytest.mark.parametrize("loss", [DepthWeighted(), SelfDistilled(share=0.25)])
def test_the_loss_weighs_every_exit_and_counts_no_padding(loss) -> None:
    model = dataclasses.replace(MODEL, exits=Exits(after=(1,), head=OwnHead(), loss=loss)).build(jax.random.key(0))
    task, batch = classification_task(TINY.augmentation, 0.1), jax.tree.map(jnp.asarray, FEW)
    output = task.forward(model, batch)
    found, logged = task.loss(model, output, batch, jnp.float32(0))
    log_p = np.asarray(jax.nn.log_softmax(output.logits), np.float64)[:, :10]
    soft = 0.9 * np.eye(10)[FEW.labels[:10]] + 0.01
    first, last = -(soft * log_p).sum(axis=2).sum(axis=1)
    assert float(logged["loss"]) == pytest.approx(last, rel=1e-5)
    if isinstance(loss, SelfDistilled):
        first = 0.75 * first + 0.25 * (np.exp(log_p[1]) * (log_p[1] - log_p[0])).sum()
    assert float(found) == pytest.approx((first + 2 * last) / 3, rel=1e-5)
    score = task.score(model, output, batch)
    right = log_p.argmax(axis=2) == FEW.labels[:10]
    np.testing.assert_array_equal(score.correct, right.sum(axis=1))
    assert int(task.targets(batch)) == 10


def test_shifts_move_an_image_and_fill_it_with_zeros() -> None:
    images = jnp.asarray(np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(40, axis=0))
    found = np.asarray(RandomShift(most=1)(jax.random.key(0), images))
    padded = np.pad(np.asarray(images[0]), ((1, 1), (1, 1), (0, 0)))
    allowed = {padded[y : y + 4, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    seen = {image.tobytes() for image in found}
    assert seen <= allowed and len(seen) > 5


def test_word_dropout_leaves_padding_alone() -> None:
    tokens = jnp.asarray(np.concatenate([np.full((50, 6), 7), np.full((50, 2), -1)], axis=1))
    found = np.asarray(WordDropout(share=0.3)(jax.random.key(0), tokens))
    assert (found[:, 6:] == -1).all() and set(found[:, :6].ravel()) == {0, 7}
    assert 0.2 < (found[:, :6] == 0).mean() < 0.4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go."""
    path = tmp_path_factory.mktemp("classifier") / "run"
    assert train_classifier(TINY, path).step == 4
    return path


def test_a_run_that_was_stopped_continues_to_the_same_bits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop_at_the_third(batch, layout):
        seen.append(batch)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(batch, layout)

    place = loop.to_device
    monkeypatch.setattr(loop, "to_device", stop_at_the_third)
    stopped = train_classifier(TINY, tmp_path / "run")
    assert (stopped.step, stopped.interrupted, stopped.exit_status) == (3, signal.SIGTERM, 0)
    monkeypatch.undo()
    ended = train_classifier(TINY, tmp_path / "run")
    assert ended.step == 4
    whole = load_classifier(run, 4)
    for found, expected in zip(
        jax.tree.leaves(load_classifier(tmp_path / "run", 4).state.params),
        jax.tree.leaves(whole.state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="batch_size: 16 in the run directory, 8 now"):
        train_classifier(dataclasses.replace(TINY, batch_size=8), run)


def test_a_mixture_of_experts_learns_digits(tmp_path: Path) -> None:
    ffn = MoE(experts=4, expert=SwiGLU(hidden=16), dispatcher=DenseDispatcher())
    experiment = dataclasses.replace(
        TINY, model=dataclasses.replace(MODEL, ffn=ffn), steps=60, batch_size=32, evaluate_every=60, checkpoint_every=60
    )
    train_classifier(experiment, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert float(lines[-1].split('"accuracy_after_2": ')[1].split(",")[0].rstrip("}")) > 0.5
    assert '"router_entropy"' in lines[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": dataclasses.replace(MODEL, classes=9)}, "model.classes is 9; the source has 10 classes"),
        (
            {"model": dataclasses.replace(MODEL, image=(4, 4, 1))},
            r"the model takes inputs of \(4, 4, 1\), and",
        ),
        ({"model": TextClassifier(classes=10, length=8)}, r"the model takes inputs of \(8,\)"),
    ],
)
def test_a_model_that_does_not_fit_its_examples_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(dataclasses.replace(TINY, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"gradient_accumulation": 3}, "gradient_accumulation is 3; it must divide batch_size=16"),
        ({"keep_best": -1}, "keep_best is -1"),
    ],
)
def test_an_experiment_refuses_what_it_cannot_do(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


BUCKETS = Buckets(smallest=8, largest=128)


def test_a_sweep_goes_from_the_full_model_to_the_first_exit() -> None:
    model = MODEL.build(jax.random.key(1))
    found = at_exits(model, DIGITS, Top2Gap(), BUCKETS)
    logits = np.asarray(model(jnp.asarray(DIGITS.inputs)).logits)
    np.testing.assert_array_equal(found.prediction, logits.argmax(axis=2))
    p = np.sort(jax.nn.softmax(logits[0]), axis=1)
    middle = float(np.median(p[:, -1] - p[:, -2]))
    guarantee = calibrate(
        model, DIGITS, Top2Gap(), thresholds=(1.0, middle, 0.0), delta=0.4, epsilon=0.1, buckets=BUCKETS
    )
    lost = (found.prediction[0] != DIGITS.labels) & (found.prediction[1] == DIGITS.labels)
    assert guarantee.threshold == 0.0 and guarantee.empirical_risk == pytest.approx(lost.mean())
    guarantee.check(policy_record(model, Top2Gap()))
    static = dataclasses.replace(MODEL, layers=1, exits=None).build(jax.random.key(2))
    swept = sweep(
        model,
        DIGITS,
        guarantee,
        Top2Gap(),
        thresholds=(1.0, middle, 0.0),
        others=[("static", static)],
        buckets=BUCKETS,
        rounds=1,
    )
    last, half, first = swept.points
    accuracy = (logits.argmax(axis=2) == DIGITS.labels).mean(axis=1)
    assert (swept.full.accuracy, last.accuracy, first.accuracy) == pytest.approx(
        (accuracy[1], accuracy[1], accuracy[0])
    )
    assert (swept.full.layers, last.layers, first.layers) == (2, 2, 1) and half.layers == pytest.approx(1.5, abs=0.01)
    assert last.flops > swept.full.flops > half.flops > first.flops and swept.others[0].name == "static"
    assert swept.others[0].flops == pytest.approx(first.flops)
    assert len(half.by_difficulty) == 4 and all(point.seconds > 0 for point in swept.points)


def test_flops_of_exits_are_counted_by_hand() -> None:
    model = MODEL.build(jax.random.key(1))
    patches = 2 * 4 * 16 * 16
    layer = 4 * (2 * 4 * 16 * 16 + 2 * 3 * 16 * 16) + 4 * 4 * 4 * 16  # four tokens; scores and their values
    layer += 2 * 2 * 4 * 4  # the angles of queries and of keys: positions times frequencies
    head = 2 * 16 * 10
    np.testing.assert_allclose(exit_flops(model), [patches + layer + head, patches + 2 * layer + 2 * head])
    assert plain_flops(model) == patches + 2 * layer + head


def test_without_exits_there_is_nothing_to_sweep() -> None:
    with pytest.raises(ValueError, match="VisionTransformer.exits is None"):
        at_exits(dataclasses.replace(MODEL, exits=None).build(jax.random.key(0)), DIGITS, Top2Gap(), BUCKETS)
