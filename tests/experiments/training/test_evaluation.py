"""Bits per byte against float64 NumPy over the logits, and independent of how the text is batched."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.experiments.data import HeldOut, held_out
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.training.evaluation import bits_per_byte
from dynamoe.experiments.training.step import Trainer, build_trainer
from dynamoe.models import Layout, MeshShape


class Measured(NamedTuple):
    experiment: Experiment
    trainer: Trainer
    params: nnx.State
    variables: nnx.State

    def text(self, batch_size: int) -> HeldOut:
        length = self.experiment.sequence_length
        return held_out(
            self.experiment.source, self.experiment.tokenizer, batch_size=batch_size, sequence_length=length
        )

    def bits(self, text: HeldOut) -> float:
        return bits_per_byte(self.trainer.evaluate, self.params, self.variables, text, self.trainer.layout)


@pytest.fixture(scope="module")
def measured(tiny: Callable[..., Experiment]) -> Measured:
    experiment = tiny()
    layout = Layout(MeshShape().build())
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=1)
    state = trainer.init(jnp.uint32(0))
    return Measured(experiment, trainer, state.params, state.variables)


@pytest.mark.smoke
def test_equals_float64_over_the_logits(measured: Measured) -> None:
    model = nnx.merge(measured.trainer.graph, measured.params, measured.variables)
    forward = jax.jit(lambda tokens, segments, positions: model(tokens, segments, positions).logits)
    text = measured.text(4)
    bits, targets = 0.0, 0
    for batch in text.batches:
        logits = np.asarray(forward(*batch.inputs), np.float64)
        for row, logits_of_row in enumerate(logits):
            for place, scores in enumerate(logits_of_row):
                document, same = batch.segments[row, place + 1], batch.segments[row, place]
                if document and document == same:
                    highest = scores.max()
                    log_sum = highest + math.log(np.exp(scores - highest).sum())
                    bits += (log_sum - scores[batch.tokens[row, place + 1]]) / math.log(2)
                    targets += 1
    size = sum(len(document.encode()) for document in measured.experiment.source.documents("validation"))
    assert targets == text.tokens
    np.testing.assert_allclose(measured.bits(text), bits / size, rtol=1e-6)


def test_does_not_depend_on_the_batch_size(measured: Measured) -> None:
    expected = measured.bits(measured.text(4))
    for batch_size in (1, 7):
        np.testing.assert_allclose(measured.bits(measured.text(batch_size)), expected, rtol=1e-6)


def test_a_model_without_an_opinion_pays_the_vocabulary_for_every_target(measured: Measured) -> None:
    text = measured.text(4)
    params = jax.tree.map(lambda array: array, measured.params)
    params["head_kernel"] = params["head_kernel"].replace(jnp.zeros((16, 258)))
    expected = text.tokens * math.log2(258) / text.bytes
    np.testing.assert_allclose(measured._replace(params=params).bits(text), expected, rtol=1e-6)
